"""Run by `run_two`: a script in two processes, as torchrun --standalone runs it, but forked from this one, which has
imported what takes long: `python tests/pair.py SCRIPT [ARGUMENT ...]`."""

import runpy
import sys

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import matt_fast.recipe.transfer  # noqa: F401, what scripts import


def run(*arguments: str) -> None:
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost", "run_id": "pair"}
    config = LaunchConfig(1, 1, 2, **place, max_restarts=0, start_method="fork")
    elastic_launch(config, run)(*sys.argv[1:])
