"""pytest-benchmark's results carry our description of the machine instead of its own, which has the host's name."""

from machine import describe


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(describe())
