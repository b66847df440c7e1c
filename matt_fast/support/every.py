"""Intervals in steps or in time: "500", "10m"."""

import re
import time
from dataclasses import dataclass, field

UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass
class Every:
    """Whether something is due that is done every so many steps, or every so many seconds.

    Attributes:
        steps, seconds: the interval; the other is None, and both where it is never due.
    """

    steps: int | None = None
    seconds: float | None = None
    _since: float = field(default_factory=time.monotonic)

    @classmethod
    def parse(cls, name: str, value: str | int | None) -> "Every":
        """An interval from an argument's value: a number of steps, or a time with one of the units s, m, h.

        Raises:
            ValueError: neither, or not above 0.
        """
        if value is None:
            return cls()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if found and float(found[1]) > 0:
            return cls(seconds=float(found[1]) * UNITS[found[2]])
        if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)) or int(value) < 1:
            raise ValueError(f"{name}: wanted a number of steps, or a time such as 30s, 10m or 2h; got {value!r}")
        return cls(steps=int(value))

    def due(self, step: int) -> bool:
        """Whether it is due behind this step; a time starts anew then."""
        if self.steps is not None:
            return step % self.steps == 0
        if self.seconds is None or time.monotonic() - self._since < self.seconds:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Let a time start anew."""
        self._since = time.monotonic()
