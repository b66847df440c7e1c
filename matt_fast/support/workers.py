"""Worker processes that end with the process that started them, however that one ends."""

import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from matt_fast.support.stopping import WARNINGS

POLL = 0.5  # seconds between two looks at who the parent is
AHEAD = 2  # items under way for each worker

_watching: int | None = None  # id of the process whose watcher runs
_forks_die = False
_forking: int | None = None  # id of the process that forks


def die_with_parent(parent_pid: int) -> None:
    """Let this worker end when its parent has ended, SIGKILL included, and when it gets SIGTERM.

    A thread looks twice a second who the parent is. SIGTERM ends the worker at once, whatever handler it has from its
    parent; SIGINT and others that a terminal or a scheduler sends to workers too are left to the parent. Call it in the
    worker's main thread;
    further calls, and a call in the parent itself, do nothing.

    Args:
        parent_pid: `os.getpid()` of the process that started the worker, as that one saw it.
    """
    global _watching
    if os.getpid() in (parent_pid, _watching):
        return
    _watching = os.getpid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)
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


class ProcessDiedError(ChildProcessError):
    """A process that was at work ended, killed by someone or by a lack of memory."""


class Ahead:
    """A process that makes items, a little ahead of who takes them.

    Items come through a pipe that the process alone writes to: killed in the middle of one it leaves an end behind, and
    nobody waits for the rest, as a reader of a multiprocessing.Queue would for ever. A thread here takes them, so that
    the next ones are there when they are asked for. It ends with the process that made it, and is killed at the end of
    the `with`.

    Args:
        make: called in the process: gives items as bytes. Where processes are forked it need not be picklable.
        open_item: called in the thread with the bytes of each; its result is the item.
        ahead: items that wait to be taken.
    """

    def __init__(self, make: Callable[[], Iterator[bytes]], open_item: Callable[[bytes], Any], ahead: int = AHEAD):
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
        self._ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_make, args=(os.getpid(), self._ours, theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._items: queue.Queue = queue.Queue(ahead)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._take, args=(open_item,), name="ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> Iterator[Any]:
        return self._given()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._process.kill()
        self._process.join()
        self._thread.join()
        self._ours.close()

    def _given(self) -> Iterator[Any]:
        """Items as they come.

        Raises:
            ProcessDiedError: the process was killed.
        """
        while True:
            item = self._items.get()
            if item is self:
                return
            if isinstance(item, ProcessDiedError):
                raise item
            yield item

    def _take(self, open_item: Callable[[bytes], Any]) -> None:
        """The thread: put what comes through the pipe into the queue until it ends."""
        while not self._over.is_set():
            try:
                content = self._ours.recv_bytes()
                item = open_item(content) if content else self
            except (EOFError, OSError):
                self._process.join()
                item = ProcessDiedError(f"process {self._process.pid} ended with exit code {self._process.exitcode}")
            except Exception as error:  # of opening it: raised where it is taken
                item = error
            while not self._over.is_set():
                try:
                    self._items.put(item, timeout=POLL)
                    break
                except queue.Full:
                    pass
            if item is self or isinstance(item, ProcessDiedError):
                return


def _make(parent_pid: int, theirs: Connection, ours: Connection, make: Callable[[], Iterator[bytes]]) -> None:
    """What the process of `Ahead` does; nothing at all says that there are no more items."""
    theirs.close()
    multiprocessing.current_process().daemon = False  # it may have workers of its own
    die_with_parent(parent_pid)
    for item in make():
        ours.send_bytes(item)
    ours.send_bytes(b"")


class OrderedPool:
    """Processes that each have a copy of an object and call its methods; results come in the order of the items.

    They end with the process that made them, and are killed at the end of the `with`. An executor of
    concurrent.futures, which waits for them, can wait for ever for one whose result nobody takes.

    Args:
        workers: processes.
        tool: the object. Where processes are forked it need not be picklable.
    """

    def __init__(self, workers: int, tool: Any):
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            self._processes[ours] = context.Process(target=_serve, args=(os.getpid(), theirs, tool), daemon=True)
            self._processes[ours].start()
            theirs.close()
        self._idle, self._waiting = list(self._processes), deque()
        self._busy: dict[Connection, _Task] = {}
        self._broken: ProcessDiedError | None = None

    def __enter__(self) -> "OrderedPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()

    def map(self, method: str, items: Iterable[Any]) -> Iterator[Any]:
        """What the object's method of that name returns for each item; items are read little ahead of what is taken.

        Several of these may be under way, the items of one being results of another.

        Raises (while iterating):
            ProcessDiedError: (a ChildProcessError) a worker was killed.
            Exception: what the method raised, in the place of its result.
        """
        items, failure = iter(items), None
        tasks: deque[_Task] = deque()
        while failure is None:
            try:
                item = next(items)
            except Exception as error:  # the end too; what came before it is handed over first
                failure = error
            else:
                tasks.append(_Task(method, item))
                self._waiting.append(tasks[-1])
                self._work(0)
            most = AHEAD * len(self._processes) if failure is None else 0
            while len(tasks) > most or (tasks and tasks[0].done):
                while not tasks[0].done:
                    self._work(None)
                yield tasks.popleft().result()
        if not isinstance(failure, StopIteration):
            raise failure

    def _work(self, timeout: float | None) -> None:
        """Take results that are there, or come in so many seconds, and keep all workers busy."""
        if self._broken is not None:
            raise self._broken
        for connection in wait(list(self._busy), timeout) if self._busy else ():
            self._busy[connection].outcome = self._with(connection, connection.recv)
            del self._busy[connection]
            self._idle.append(connection)
        while self._idle and self._waiting:
            connection, task = self._idle.pop(), self._waiting.popleft()
            self._with(connection, lambda to=connection, of=task: to.send((of.method, of.item)))
            self._busy[connection], task.item = task, None

    def _with(self, connection: Connection, use: Callable[[], Any]) -> Any:
        try:
            return use()
        except (EOFError, ConnectionError) as error:
            process = self._processes[connection]
            process.join()
            self._broken = ProcessDiedError(f"worker {process.pid} ended with exit code {process.exitcode}")
            raise self._broken from error


@dataclass
class _Task:
    method: str
    item: Any
    outcome: tuple[bool, Any] | None = None  # (whether it went well, result or exception)

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def result(self) -> Any:
        good, value = self.outcome
        if not good:
            raise value
        return value


def _serve(parent_pid: int, connection: Connection, tool: Any) -> None:
    """What a worker of an `OrderedPool` does."""
    die_with_parent(parent_pid)
    gc.freeze()  # what was there before is not looked through again and again
    while True:
        method, item = connection.recv()
        try:
            outcome = True, getattr(tool, method)(item)
        except Exception as error:
            outcome = False, error
        connection.send(outcome)


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
