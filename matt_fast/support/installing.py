"""What to type for a package that an option needs, in the environment that this program runs in."""

import os
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NAME = "matt-fast"


def install_line(extra: str) -> str:
    """The command that installs what an extra of matt-fast brings, such as "pip install 'matplotlib>=3.8'".

    It names those packages and not "matt-fast[extra]": so it holds for a checkout, a wheel and an index alike, and
    matt-fast itself stays as it is. Where the metadata does not know the extra, a sentence that names it.

    Args:
        extra: one in pyproject.toml's optional-dependencies.
    """
    from packaging.requirements import Requirement

    try:
        found = distribution(NAME)
    except PackageNotFoundError:  # a checkout that was never installed
        found = None
    if found is None or extra not in (found.metadata.get_all("Provides-Extra") or ()):  # or installed before it had it
        return f"install {NAME} again, with its extra {extra!r}"
    needs = [Requirement(text) for text in found.requires or ()]
    return packages_line(
        *(
            f"{need.name}{need.specifier}"
            for need in needs
            if need.marker and need.marker.evaluate({"extra": extra}) and not need.marker.evaluate({"extra": ""})
        )
    )


def packages_line(*packages: str) -> str:
    """The command that installs packages into this environment: by pip, or by uv if uv made the environment.

    It names this environment's Python where a shell would not find it by itself.
    """
    python = shlex.quote(sys.executable)
    pip = shutil.which("pip")
    if pip and Path(pip).parent == Path(sys.executable).parent:
        command = "pip install"
    elif not _installed_by_uv():
        command = f"{python} -m pip install"
    elif os.environ.get("VIRTUAL_ENV") == sys.prefix:
        command = "uv pip install"
    else:
        command = f"uv pip install --python {python}"
    return f"{command} {' '.join(shlex.quote(package) for package in packages)}"


def _installed_by_uv() -> bool:
    try:
        return (distribution(NAME).read_text("INSTALLER") or "").strip() == "uv"
    except PackageNotFoundError:
        return False
