"""Folders that one process at a time works in: a lock that ends with the process, and who holds it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends, and that its children do not have."""
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise FileExistsError(f"output: {str(path.parent.parent)!r} is being written by {owner}") from error
        except OSError as error:
            raise OSError(
                error.errno, f"output: wanted a file system with locks, which that of {str(path)!r} refuses: {error}"
            ) from error
        file.truncate(0)
        file.write(f"{this_process()}\n")
        file.flush()
        yield


def at_work(path: Path) -> str | None:
    """Who holds the lock of `locked` on a file; None where nobody does.

    Not for the process that holds it: the system takes off a process's locks when it closes a file that has some.
    """
    try:
        with path.open("r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return file.read().strip() or "another process"
    except OSError:  # no such file, one that is not ours, or a file system without locks
        pass
    return None
