"""What a checkpoint costs: `.venv/bin/python benchmarks/bench_checkpoints.py ROWS HIDDEN [FOLDER]`.

Writes three checkpoints of so many trained rows, flushed to the disk, and prints the seconds of each and the share of
ten minutes, which is how often they are written unless they would take more than 1% of the time.
"""

import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from usage import arguments

from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe.watching import USUAL
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.options import TrainingOptions
from matt_fast.training.sides import Student
from matt_fast.training.state import TrainingState


def main(rows: int, hidden: int, place: str | None = None) -> None:
    table = EmbeddingTable(torch.zeros(1, hidden), torch.full((rows,), -1), torch.randn(rows, hidden))
    state = TrainingState.begin(Student(table), TrainingOptions())
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        checkpoints = Checkpoints(Path(folder))
        for step in range(1, 4):
            state.progress.step = step
            begin, worked = time.perf_counter(), time.process_time()
            checkpoints.write(state, accelerator)
            seconds, worked = time.perf_counter() - begin, time.process_time() - worked
            size = sum(x.stat().st_size for x in checkpoints.steps()[-1].iterdir())
            print(f"{size / 2**20:,.0f} MiB: {seconds:.2f} s, {worked:.2f} of the processor; {seconds / USUAL:.2%}")


if __name__ == "__main__":
    main(*arguments(__doc__, int, int, str, least=2))
