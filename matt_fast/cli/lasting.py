"""Output that may end before the work does: a closed terminal, a pipe whose reader has gone, a log on a full disk."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matt_fast.support.files import FULL


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let work go on whose stdout or stderr can no longer be written, which the other of the two is told, once."""
    before = sys.stdout, sys.stderr
    out, err = _Lasting(before[0], "stdout"), _Lasting(before[1], "stderr")
    out.other, err.other = err, out
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream that goes nowhere from the first write on that fails; one that has no room is tried again."""

    def __init__(self, stream: Any, name: str):
        self._stream, self._name, self._lost = stream, name, False
        self.other = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if error.errno in FULL:
            return
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what waits in buffers goes there too, at the end of the process
            os.close(nowhere)
        if not self._lost:
            self._lost = True
            self.other.write(f"{self._name} cannot be written any more ({error.strerror}); the work goes on.\n")
            self.other.flush()
