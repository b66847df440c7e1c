"""What a check found, in one line."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

OK, LOOK, FAIL = "ok", "look at this", "will fail"


class Said(NamedTuple):
    """What a check says: a verdict, what it found, and what to do."""

    verdict: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        area, name: what was looked at: "data", "segments".
        verdict: "ok", "look at this" or "will fail".
        found: what is there.
        advice: what to do; "" where `found` says it, or where there is nothing to do.
    """

    area: str
    name: str
    verdict: str
    found: str
    advice: str = ""


class Enough(Exception):
    """The time for reading is over."""


class ForSeconds:
    """Tells how far reading is, as `Subject.tell` does, and ends it by `Enough` when so many seconds are over.

    Attributes:
        done, total: what was told last.
    """

    def __init__(self, seconds: float, tell: Callable[[str, int, int | None], None]):
        self.end, self.tell = time.monotonic() + seconds, tell
        self.done, self.total = 0, None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.done, self.total = done, total
        self.tell(what, done, total)
        if time.monotonic() > self.end and done != total:
            raise Enough


def ok(found: str) -> Said:
    return Said(OK, found)


def look(found: str, advice: str = "") -> Said:
    return Said(LOOK, found, advice)


def fail(found: str, advice: str = "") -> Said:
    return Said(FAIL, found, advice)


def share(part: int, whole: int) -> str:
    """ "12% of 1,234": of nothing it is 0%, and what is not all is never 100%."""
    percent = 100 * part / max(1, whole)
    shown = f"{percent:.0f}" if percent in (0, 100) or 1 <= percent <= 99 else f"{percent:.2g}"
    return f"{'99.9' if part < whole and shown == '1e+02' else shown}% of {whole:,}"
