"""How a step that does not succeed ends: refused, in an error of one line, or with its process."""

import os
import sys

import torch


class Refused(Exception):
    """A step that must not run; the reason is its result."""


def short(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def stop_if_broken(device: str, reason: str = "") -> None:
    """An illegal access breaks every later call of the process: end it, the parent starts another."""
    if device == "cpu":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        print(reason, file=sys.stderr, flush=True)
        os._exit(3)
