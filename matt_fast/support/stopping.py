"""Signals that ask work to end: work that can end in order is asked to, other work is left at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matt_fast.support.printable import printable

# Of a terminal that is closed, and of schedulers before the time is up (sbatch --signal); not on Windows.
WARNINGS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
AGAIN = 2.0  # seconds from which on a further Ctrl-C is a person's, who does not want to wait
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)


class BrokenOffError(Exception):
    """Work that a signal asks to end was left in the middle; whoever began it ends the rest in order."""


class Stopping:
    """What a signal asked for.

    Attributes:
        requested: the signal that came; None so far.
        patient: whether the work ends by itself soon once `requested` is set. Where it does not, and at a second
            Ctrl-C, the work is left at once by an exception, see `leave`.
        breaks_off: whether `check` leaves such patient work by a `BrokenOffError`, once a signal came.
        how_to_go_on: what is printed then.
    """

    def __init__(self):
        self.requested: int | None = None
        self._since = 0.0
        self.patient = self.breaks_off = False
        self.how_to_go_on: Callable[[], str] = str

    def leave(self) -> None:
        """Raise what the signal asks for: KeyboardInterrupt, or SystemExit with 128 and its number: 143 of SIGTERM."""
        if text := self.how_to_go_on():
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print(printable(text), file=sys.stderr, flush=True)
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.requested)

    def check(self) -> None:
        """Leave if a signal came whose exception got lost: Python drops those that are raised in some callbacks."""
        if self.requested is not None and self.breaks_off:
            raise BrokenOffError
        if self.requested is not None and not self.patient:
            self.leave()

    def receive(self, number: int, frame: object = None) -> None:
        """Note a signal, or act on it. One may come several times: shells, torchrun and Slurm pass on what all got."""
        if self.requested is None:
            self.requested, self._since = number, time.monotonic()
            if not self.patient:
                self.leave()
        elif number == signal.SIGINT and time.monotonic() - self._since > AGAIN:
            self.requested = number
            self.leave()


@contextmanager
def stopping() -> Iterator[Stopping]:
    """Receive SIGNALS while the block runs, in the main thread; what was set before is set again behind it.

    Of those in WARNINGS one that is ignored stays so: nohup ignores SIGHUP. Processes that are forked meanwhile do what
    they would do without it.
    """
    stop, owner = Stopping(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number, frame):
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        stop.receive(number, frame)

    ignored = [number for number in WARNINGS if signal.getsignal(number) == signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
