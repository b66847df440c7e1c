"""SIGTERM and Ctrl-C: work that can end in order is asked to, other work is left at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matt_fast.support.printable import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """What a signal asked for.

    Attributes:
        requested: the signal that came; None so far.
        patient: whether the work ends by itself soon once `requested` is set. Where it does not, and at the second
            signal, the work is left at once by an exception, see `leave`.
        how_to_go_on: what is printed then.
    """

    def __init__(self):
        self.requested: int | None = None
        self.patient = False
        self.how_to_go_on: Callable[[], str] = str

    def leave(self) -> None:
        """Raise what the signal asks for: KeyboardInterrupt, or SystemExit with status 143."""
        if text := self.how_to_go_on():
            print(printable(text), file=sys.stderr, flush=True)
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.requested)

    def check(self) -> None:
        """Leave if a signal came whose exception got lost: Python drops those that are raised in some callbacks."""
        if self.requested is not None and not self.patient:
            self.leave()

    def receive(self, number: int, frame: object = None) -> None:
        again = self.requested is not None
        self.requested = number
        if again or not self.patient:
            self.leave()


@contextmanager
def stopping() -> Iterator[Stopping]:
    """Receive SIGTERM and SIGINT while the block runs, in the main thread; what was set before is set again behind it.

    Processes that are forked meanwhile do what they would do without it.
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

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
