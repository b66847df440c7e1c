"""Files that are whole or not there: written under another name, flushed to the disk, then renamed.

A name that begins with PART belongs to a write that is under way, or to one whose process was killed.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"
PROBE = 1 << 24  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or a share of it
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that Git LFS did not fetch
LATE = 60.0  # seconds that a network file system may take to show what another machine wrote


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when the block ends, or vanishes with an error."""
    path = Path(path)
    part = path.with_name(PART + path.name)
    try:
        with _named(path, part):
            yield part
            flush(part)
        os.replace(part, path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill; it becomes `path` when the block ends, in place of what was there, or vanishes.

    An empty folder is filled where it is: it may be a link, a disk of its own, or in one that cannot be written.
    """
    path = Path(path)
    inside = is_empty(path)
    part = path / PART if inside else path.with_name(PART + path.name)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with _named(path, part):
            yield part
            readable(part)
            flush_tree(part)
        if inside:
            move_into(part, path)
        else:
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(part, path)
            flush(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _named(path: Path, part: Path | None = None) -> Iterator[None]:
    """Writers in Python and in Rust say that a disk is full, but not which one; and name the part of a file."""
    try:
        yield
    except Exception as error:
        raise_if_full(error, path)
        if getattr(error, "filename", None) == str(part):
            error.filename = str(path)
        raise


def raise_if_full(error: Exception, path: str | Path) -> None:
    """Raise an OSError that names the path in place of one, by Python or Rust, that says that the disk is full."""
    if getattr(error, "errno", None) in FULL or f"os error {errno.ENOSPC}" in str(error):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def check_writable(argument: str, path: str | Path) -> None:
    """Look whether a folder can be written, a symlink to one or a mount point included; one that is missing, made.

    It is tried, where the folder is or in the nearest one above it: a file is written there, renamed and removed.
    Several processes may look at once.

    Args:
        argument: what errors call the folder.
        path: the folder.

    Raises:
        OSError: a file is there, or a folder or file cannot be made.
        ValueError: the path begins with "~": a folder of that name is not what was meant.
    """
    path = Path(path)
    if path.parts[:1] == ("~",):
        raise ValueError(f"{argument}: wanted a path that names the home folder, got {str(path)!r}")
    nearest = next(x for x in (path, *path.parents) if os.path.lexists(x))
    try:
        with tempfile.TemporaryDirectory(prefix=".matt-fast-probe-", dir=nearest) as probe:
            Path(probe, "file").write_text("content")
            os.replace(Path(probe, "file"), Path(probe, "renamed"))
    except OSError as error:
        raise type(error)(
            f"{argument}: wanted a folder that can be written, got {str(path)!r}: {error.strerror}"
        ) from error


def move_into(source: Path, target: Path, last: tuple[str, ...] = ()) -> None:
    """Move everything in folder `source` into folder `target`, files called `last` at the end; then remove `source`.

    Each file is moved in one rename; done again after a stop in the middle, it goes on where it stopped.
    """
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
        goal = target / entry.name
        if goal.is_dir() and not goal.is_symlink():
            shutil.rmtree(goal)
        os.replace(entry, goal)
        if entry.name in last:
            flush(target)
    flush(target)
    source.rmdir()


def wait_to_see(path: Path) -> None:
    """Wait until a path that another process made is there for this one too; FileNotFoundError after a minute."""
    end = time.monotonic() + LATE
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{str(path)!r} was written by another process, but is not seen here")
        os.listdir(path.parent)  # makes NFS ask for what is new
        time.sleep(0.1)


def is_empty(folder: Path) -> bool:
    """Whether a folder is there and has nothing in it but what a killed write left."""
    return folder.is_dir() and all(x.name.startswith(PART) for x in folder.iterdir())


def remove_parts(folder: Path) -> list[Path]:
    """Remove what killed writes left in a folder that nobody writes to; returns what it was."""
    found = sorted(folder.glob(PART + "*"))
    for path in found:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return found


def readable(folder: Path) -> None:
    """Let others read what is in a folder as far as the process's umask does: some libraries write private files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def seconds_to_write(folder: Path, size: int) -> float:
    """How long writing so many bytes into a folder should take, flushed, by what no more of them, and 16 MiB, take."""
    probe, part = folder / f"{PART}probe", max(1, min(PROBE, size))
    begin = time.perf_counter()
    try:
        with _named(folder):
            probe.write_bytes(os.urandom(part))
            flush(probe)
    finally:
        probe.unlink(missing_ok=True)
    return (time.perf_counter() - begin) * size / part


def flush_tree(folder: Path) -> None:
    """`flush` for everything in a folder, and for the folder itself."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)
