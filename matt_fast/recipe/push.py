"""The output of a transfer, put on the Hugging Face hub: what goes up, whether that is allowed, and the push itself."""

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matt_fast.support.files import PART

LEFT_OUT = ("run", "adapter", "report.html")  # unless asked for: paths of this machine, what only a trainer wants
CHECKPOINTS = "checkpoint"  # folders that trainers write
WEIGHTS = re.compile(r".*\.(safetensors|bin)(\.index\.json)?")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Target:
    """A repository on the hub.

    Attributes:
        name: OWNER/NAME.
        public: whether everyone may see it.
        there: the files that it has; None where it is to be made.
    """

    name: str
    public: bool
    there: Sequence[str] | None

    def command(self, folder: Path, files: Sequence[tuple[str, int]] = ()) -> str:
        """How to push a folder there by hand, and what of it is left out else, where that is among the files."""
        tops = {name.partition("/")[0] for name, _ in files}
        more = ["--public"] * self.public + [f"--also {x}" for x in LEFT_OUT if x in tops]
        return " ".join([f"matt-fast push {shlex.quote(str(folder))} --to {self.name}", *more])

    @property
    def described(self) -> str:
        state = "new" if self.there is None else "there already: a new commit"
        return f"{self.name} ({'public' if self.public else 'private'}, {state})"

    def replaced(self, files: Sequence[tuple[str, int]]) -> list[str]:
        """Weights that are there and belong to no file of these: of a model that was cut into other files."""
        ours = {name for name, _ in files}
        return [x for x in self.there or () if WEIGHTS.fullmatch(x) and "/" not in x and x not in ours]


def files_to_push(folder: Path, also: Collection[str] = ()) -> list[tuple[str, int]]:
    """(name, bytes) of the files that go up: the model, its tokenizer, its card. No run, no checkpoint, no adapter.

    Args:
        folder: output of a transfer.
        also: what of LEFT_OUT goes up too.

    Raises:
        FileNotFoundError: there is no model in the folder, or not what `also` names.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder: wanted the output of a transfer with config.json, got {str(folder)!r}")
    for name in also:
        if name not in LEFT_OUT:
            raise ValueError(f"also: wanted {', '.join(LEFT_OUT)}, got {name!r}")
        if not (folder / name).exists():
            raise FileNotFoundError(f"also: wanted something in {str(folder)!r}, which has no {name!r}")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        top = name.parts[0]
        left_out = top in LEFT_OUT and top not in also
        passing = any(x.startswith((".", PART, CHECKPOINTS)) for x in name.parts if top not in also)
        if path.is_file() and not left_out and not passing and name.parts != ("run", "lock"):
            found.append((name.as_posix(), path.stat().st_size))
    return found


def find_target(name: str, public: bool, argument: str) -> Target:
    """The repository of that name, after asking the hub whether this login may write there.

    Args:
        name: OWNER/NAME, or NAME for one of whoever is logged in.
        public: whether everyone may see it.
        argument: what errors call the name.

    Raises:
        ValueError: the name has another shape; there is no login, or one that may only read; or a public repository
            without `public`.
        OSError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    check_name(name, argument)
    if get_token() is None:
        raise ValueError(f"{argument}: wanted a token that may write to {name!r}, got none: {LOGIN}")
    api = HfApi()
    try:
        about = api.whoami()
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            raise ValueError(f"{argument}: the hub does not take the token that is here: {LOGIN}") from error
        raise OSError(f"{argument}: the hub did not say who is logged in: {_line(error)}") from error
    except Exception as error:  # of many kinds, by the network
        raise OSError(f"{argument}: the hub cannot be reached: {_line(error)}") from error
    name = name if "/" in name else f"{about['name']}/{name}"
    _check_rights(about, name, argument)
    try:
        info = api.repo_info(name, files_metadata=False)
    except RepositoryNotFoundError:
        return Target(name, public, None)
    except Exception as error:
        raise OSError(f"{argument}: the hub did not say whether {name!r} is there: {_line(error)}") from error
    if not info.private and not public:
        raise ValueError(f"{argument}: {name!r} is there already, and everyone sees it: give --public to mean that")
    return Target(name, not info.private, [x.rfilename for x in info.siblings or ()])


def check_name(name: str, argument: str) -> None:
    """Raise a ValueError that names the argument unless a name has the shape OWNER/NAME or NAME."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{argument}: wanted a name like OWNER/NAME, got {name!r}: {_line(error)}") from error


def _check_rights(about: dict[str, Any], name: str, argument: str) -> None:
    """Whether the login that `whoami` tells of may write to a repository."""
    owner = name.partition("/")[0]
    orgs = {x.get("name"): x for x in about.get("orgs", ())}
    if owner != about["name"] and owner not in orgs:
        raise ValueError(f"{argument}: {about['name']!r} is logged in, who is no member of {owner!r}, got {name!r}")
    if orgs.get(owner, {}).get("roleInOrg") == "read":
        raise ValueError(f"{argument}: {about['name']!r} may only read in {owner!r}, got {name!r}")
    token = about.get("auth", {}).get("accessToken", {})
    role = token.get("role")
    if role == "read" or (role == "fineGrained" and not _may_write(token.get("fineGrained", {}), owner, name)):
        shown = token.get("displayName", "")
        raise ValueError(f"{argument}: the token {shown!r} may not write to {name!r}: make one that may, and {LOGIN}")


def _may_write(rights: dict[str, Any], owner: str, name: str) -> bool:
    scopes = (x for x in rights.get("scoped", ()) if x.get("entity", {}).get("name") in (owner, name))
    return any("repo.write" in x.get("permissions", ()) for x in scopes)


def push(folder: Path, target: Target, files: Sequence[tuple[str, int]]) -> str:
    """Put files of a folder into a repository, which is made where it is not there; returns its address.

    Raises:
        OSError: it did not work; the message says how to do it again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name, _ in files]
    operations += [CommitOperationDelete(path_in_repo=name) for name in target.replaced(files)]
    api = HfApi()
    try:
        url = api.create_repo(target.name, private=not target.public, exist_ok=True)
        api.create_commit(target.name, operations, commit_message="Model with a new tokenizer, by matt-fast")
        return str(url)
    except Exception as error:  # of many kinds, by the network
        raise OSError(
            f"push: {target.name!r} did not take it: {_line(error)}\n"
            f"The model is in {str(folder)!r}. To push it again: {target.command(folder, files)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
