"""Worker processes that end with the process that started them, however that one ends."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL = 0.5  # seconds between two looks at who the parent is

_watching: int | None = None  # id of the process whose watcher runs
_forks_die = False
_forking: int | None = None  # id of the process that forks


def die_with_parent(parent_pid: int) -> None:
    """Let this worker end when its parent has ended, SIGKILL included, and when it gets SIGTERM.

    A thread looks twice a second who the parent is. SIGTERM ends the worker at once, whatever handler it has from its
    parent; SIGINT, which a terminal sends to workers too, is left to the parent. Call it in the worker's main thread;
    further calls, and a call in the parent itself, do nothing.

    Args:
        parent_pid: `os.getpid()` of the process that started the worker, as that one saw it.
    """
    global _watching
    if os.getpid() in (parent_pid, _watching):
        return
    _watching = os.getpid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent_pid,), name="die-with-parent", daemon=True).start()


@contextmanager
def forks_die_with_us() -> Iterator[None]:
    """Let every process that is forked inside call `die_with_parent` first: also those that a library starts."""
    global _forks_die
    before, _forks_die = _forks_die, True
    try:
        yield
    finally:
        _forks_die = before


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:  # an orphan gets another parent at once
        time.sleep(POLL)
    os._exit(1)


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()  # the child cannot ask: its parent may be gone by then


def _after_fork() -> None:
    if _forks_die:
        die_with_parent(_forking)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
