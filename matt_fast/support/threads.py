"""How many cores this process has, and how threads that wait for each other do so."""

import os


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, where the environment says nothing else; before torch is imported.

    A thread that waits for another one spins for a while otherwise. On a machine with other work the other thread is
    often not even running, and the spinning costs more processor time than the work. For programs only: the setting
    is in the environment, and processes that are started later have it too.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
