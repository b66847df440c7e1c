"""Folders to work in that do not stay for ever: what a killed process left is removed by the next one."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX, LOCK = ".matt-fast-", "lock"

_mine: set[Path] = set()  # a process's locks do not hold off the process itself


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone at the end, whatever that is; what killed processes left there goes first.

    A lock in it, held while the process lives, tells others that it is in use.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale(parent)
    folder, lock = _locked(parent)
    owner = os.getpid()
    _mine.add(folder)
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # not in a forked worker that leaves by an exception
            shutil.rmtree(folder, ignore_errors=True)
            _mine.discard(folder)
            os.close(lock)


def remove_stale(parent: Path) -> list[Path]:
    """Remove the work folders in `parent` whose processes are gone; returns them."""
    removed = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        if folder.resolve() in _mine:
            continue
        try:
            lock = os.open(folder / LOCK, os.O_RDWR)
        except OSError:  # being made or being removed
            continue
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        except OSError:  # its process lives
            continue
        finally:
            os.close(lock)
    return removed


def _locked(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)).resolve()
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / LOCK).exists():
                return folder, lock
        except (BlockingIOError, PermissionError):  # taken for stale before it was locked
            pass
        except OSError:  # a file system without locks: nothing on it is ever taken for stale
            return folder, lock
        os.close(lock)
