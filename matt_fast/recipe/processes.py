"""The processes of a run: they wait for each other however long one works, and an error of one ends all of them.

What they tell each other goes through torch.distributed's TCPStore, which launchers name in MASTER_ADDR and
MASTER_PORT: unlike a barrier, waiting there ends when a process says why it cannot come, or is no longer heard of.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

TIMEOUT = "MATT_FAST_TIMEOUT"
USUAL = 1800.0  # seconds, as transformers' ddp_timeout
LOOKS = 0.01, 0.5  # seconds between two looks whether all have come: at first, and at most
BEAT = 0.5  # seconds between two signs of life
GRACE = 5.0  # seconds in which the others read why a process ends
ALL = "all"
SHOWN = 5  # differences in an error
LONG = 40  # characters: longer values are digests, which say nothing


class OtherProcessError(RuntimeError):
    """Another process ended with an error, which this one tells; or nothing is heard of it any more."""

    said_by_all = True  # the command line prints it once for each machine


def timeout() -> timedelta:
    """How long a process may say nothing: MATT_FAST_TIMEOUT, in seconds. Raises a ValueError if it is no number."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or USUAL)
    except ValueError:
        seconds = -1.0
    if not 2 <= seconds < float("inf"):
        raise ValueError(f"{TIMEOUT}: wanted seconds in the environment, 2 or more, got {text!r}")
    return timedelta(seconds=seconds)


def started() -> int:
    """How many processes a launcher, such as torchrun, started together with this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def check_alone(argument: str, what: str) -> None:
    """Raise a ValueError where other processes would do the same beside this one."""
    if (count := started()) > 1:
        raise ValueError(f"{argument}: wanted {what} in one process, got {count} that a launcher started")


class Processes:
    """The processes that work on a run, as one of them sees them; of a single one all is done at once.

    Every process calls `wait` and `of_main` as often as the others, and in the same order.

    Args:
        accelerator: of the run.

    Attributes:
        count, index: how many there are, and which this is; 0 is the main one.
        hosts: the name of each one's machine.
        first_here: whether this is the first on its machine.
    """

    def __init__(self, accelerator: Accelerator):
        self.count, self.index = accelerator.num_processes, accelerator.process_index
        self.first_here = accelerator.is_local_main_process
        self.hosts = [socket.gethostname()]
        self._waits, self._values, self._inside = 0, 0, False
        if self.count > 1:
            self._join()

    def _join(self) -> None:
        known = gather_object([(uuid.uuid4().hex, *self.hosts)])
        self.hosts = [host for _, host in known]
        self._silence = timeout()
        self._next_look = 0.0
        self._lock, self._heard = threading.Lock(), None  # [process, its error]
        place = known[0][0]  # one of our own: restarted processes may find the store of those before them
        self._store, beats = (dist.PrefixStore(place, self._connect()) for _ in range(2))
        self._life: dict[int, tuple[bytes, float]] = {}  # of each process its last sign, and when it was new here
        self._over = threading.Event()
        beats.set(f"life/{self.index}", "0")
        self._thread = threading.Thread(target=self._live, args=(beats,), name="signs of life", daemon=True)
        self._thread.start()

    def _connect(self) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=self._silence)

    def _live(self, store: dist.Store) -> None:
        """The thread: give signs of life, and hear of an error while the process waits for something else."""
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            try:
                store.set(f"life/{self.index}", str(number))
                if self._hear(store):
                    return
            except dist.DistError:  # the main process is gone
                return

    def name(self, index: int) -> str:
        return f"process {index} on {self.hosts[index]}"

    def wait(self) -> None:
        """Wait until every process is here.

        Raises:
            OtherProcessError: one of them ended, or was not heard of for as long as `timeout` says.
        """
        if self.count == 1:
            return
        self._waits, self._inside = self._waits + 1, True
        key, (pause, most) = f"wait/{self._waits}", LOOKS
        with self._connection():
            if self._store.add(key, 1) == self.count:
                self._store.set(f"{key}/over", ALL)
            while not self._store.check([f"{key}/over"]):  # no blocking wait: signals are heeded between two looks
                time.sleep(pause)
                pause = min(2 * pause, most)
                if pause == most:
                    self._check_life()
            if self._store.get(f"{key}/over").decode() != ALL:
                self._hear(self._store)
                raise OtherProcessError(self._told())
            before = f"wait/{self._waits - 1}"
            self._forget(before, f"{before}/over")
        self._inside = False

    def of_main(self, value: Any) -> Any:
        """What the main process has here, as JSON: a decision that all are to take alike."""
        if self.count == 1:
            return value
        self._values += 1
        key = f"value/{self._values}"
        with self._connection():
            if self.index == 0:
                self._store.set(key, json.dumps(value))
            self.wait()
            self._forget(f"value/{self._values - 1}")
            return json.loads(self._store.get(key))

    def _forget(self, *keys: str) -> None:
        """Take what all have read out of the store, which is in the main process's memory: runs are long."""
        for key in keys if self.index == 0 else ():
            self._store.delete_key(key)

    @contextmanager
    def first(self, here: bool) -> Iterator[None]:
        """The main process does the block before the others do; with `here` the first one of each machine."""
        leads = self.first_here if here else self.index == 0
        if not leads:
            self.wait()
        yield
        if leads:
            self.wait()

    def check_same(self, own: Mapping[str, str | None]) -> None:
        """Raise the same ValueError in each process if what the machines have by these names is not the same.

        Args:
            own: of this process; what those behind the first of a machine give does not count.
        """
        if self.count == 1:
            return
        main, differences = self.of_main(dict(own)), []
        if self.first_here:
            differences = [self._difference(x, own.get(x), main.get(x)) for x in sorted(own.keys() | main.keys())]
        found = [x for part in self._of_all(differences) for x in part if x is not None]
        if found:
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ValueError(f"processes: wanted the same on all machines, got {'; '.join(found[:SHOWN])}{more}")

    def _difference(self, key: str, mine: str | None, main: str | None) -> str | None:
        if mine == main:
            return None
        if None in (mine, main):
            return f"{key} only for {self.name(0 if mine is None else self.index)}"
        if max(len(mine), len(main)) > LONG:
            return f"another {key} for {self.name(self.index)}"
        return f"{key} {mine} for {self.name(self.index)}, {main} for {self.name(0)}"

    def _of_all(self, differences: list[str | None]) -> list[list[str | None]]:
        with self._connection():
            self._store.set(f"differences/{self.index}", json.dumps(differences))
            self.wait()
            return [json.loads(x) for x in self._store.multi_get([f"differences/{i}" for i in range(self.count)])]

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise OtherProcessError(f"{self.name(0)} is gone: {_first_line(error)}") from error

    def _check_life(self) -> None:
        """Raise an OtherProcessError if a process has not been heard of for too long."""
        now, keys, most = time.monotonic(), [f"life/{i}" for i in range(self.count)], self._silence.total_seconds()
        if now < self._next_look:
            return
        self._next_look = now + BEAT
        for index, sign in enumerate(self._store.multi_get(keys)):
            if self._life.get(index, (b"", 0.0))[0] != sign:
                self._life[index] = sign, now
            elif now - self._life[index][1] > most:
                raise OtherProcessError(f"nothing was heard of {self.name(index)} for {most:g} seconds ({TIMEOUT})")

    def _hear(self, store: dist.Store) -> bool:
        """Whether a process ended with an error, which is kept."""
        with self._lock:
            if self._heard is None and store.check(["error"]):
                self._heard = json.loads(store.get("error"))
                if self._heard[0] != self.index:
                    store.add("heard", 1)
        return self._heard is not None

    def _told(self) -> str:
        """What another process ended with."""
        index, message = self._heard
        return f"{self.name(index)}: {message}"

    def leave(self, error: BaseException | None = None) -> BaseException | None:
        """End in order: the others are told of an error first.

        Returns:
            What this process is to raise; None without an error.
        """
        if self.count == 1:
            return error
        self._end = time.monotonic() + GRACE
        broken = isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError))
        if broken:
            error = OtherProcessError(f"lost the connection to another process: {_first_line(error)}")
        if broken and self._heard is not None:
            error = OtherProcessError(self._told())
        with suppress(dist.DistError):  # the main process is gone, and with it all that could be told
            if self._heard is None and error is not None and (broken or not isinstance(error, OtherProcessError)):
                error = self._tell(error, broken)
            if self._heard is None or self._heard[0] > 0:  # the store, which may end with the main process, is there
                self._store.add("left", 1)
                if self.index == 0:
                    self._linger("left", self.count)
        self._over.set()
        self._thread.join()
        return error

    def _tell(self, error: BaseException, broken: bool) -> BaseException:
        """Tell the others of an error, unless one of them was faster; returns what is to be raised.

        Args:
            error: of this process.
            broken: whether it comes of another one's end.
        """
        by_signal = isinstance(error, SystemExit | KeyboardInterrupt)
        message = "stopped by a signal" if by_signal else str(error) or type(error).__name__
        self._store.compare_set("error", "", json.dumps([self.index, message]))
        self._hear(self._store)
        self._store.set(f"wait/{self._waits + (not self._inside)}/over", "")  # where the others wait
        if self._heard[0] == self.index:
            self._linger("heard", self.count - 1)
            return error
        if broken:
            return OtherProcessError(self._told())
        error.said_by_all = self._heard[1] == message
        return error

    def _linger(self, key: str, count: int) -> None:
        while self._store.add(key, 0) < count and time.monotonic() < self._end:
            time.sleep(0.05)


@contextmanager
def together(accelerator: Accelerator) -> Iterator[Processes]:
    """The processes of a run. An error in the block is told to the others, and ends their next `wait`."""
    processes = Processes(accelerator)
    try:
        yield processes
    except BaseException as error:
        found = processes.leave(error)
        if found is error:
            raise
        raise found from error
    processes.leave()


def _first_line(error: Exception) -> str:
    """Of an error of torch or gloo what it says, without the place in their code and advice."""
    return str(error).strip().split("\n", 1)[0].split(". This is typically", 1)[0].rpartition("] ")[2]
