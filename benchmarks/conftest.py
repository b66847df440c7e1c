"""What pytest-benchmark's results say of their conditions: our description of the machine, since its own has the host's
name, and the commit at the start, since its own is that of the end."""

from machine import describe
from pytest_benchmark.utils import get_commit_info

COMMIT = get_commit_info()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(describe())


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.update(COMMIT)
