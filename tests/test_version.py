"""Which version the package says it is."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def test_a_folder_on_the_path_is_enough():
    """Without the package's metadata, as on a machine where nothing was installed."""
    code = (
        "import importlib.metadata as m; found = m.Distribution.from_name\n"
        "def missing(name):\n"
        "    if name == 'matt-fast': raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.Distribution.from_name = missing\n"
        "import matt_fast; print(matt_fast.__version__)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.stdout.strip() == "not installed", ended.stderr


def test_the_installed_version():
    import matt_fast

    assert matt_fast.__version__ == version("matt-fast")
