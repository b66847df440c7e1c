"""Results of slow work, kept in a file as they come: who is killed goes on behind them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


class Journal:
    """What was made, by a key; of one process at a time.

    Args:
        path: of a file with a line for each result, which need not be there yet. A last line that a kill left
            unfinished is taken away.
    """

    def __init__(self, path: Path):
        self.path, self._known, size = path, {}, 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                os.truncate(path, size)
                break
            try:
                self._known.update(json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: wanted JSON objects, one a line, got {line[:40]!r}; delete it to make all of it again"
                ) from error
            size += len(line)

    def __call__(self, key: str, make: Callable[[], Found]) -> Found:
        """What `make` gives, as JSON has it: read, if it was made before, or made now and written down."""
        if key not in self._known:
            found = make()
            with self.path.open("ab") as file:
                file.write(json.dumps({key: found}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._known[key] = found
        return self._known[key]
