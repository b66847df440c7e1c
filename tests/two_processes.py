"""Run by test_processes.py under torchrun: each process trains on its own half of the batches."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny import new_tokenizer
from transformers import AutoTokenizer

from matt_fast.data.chunks import Side
from matt_fast.data.stream import AlignedBatches
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.teacher import Teacher
from matt_fast.training.loop import TrainingOptions, freeze, train
from matt_fast.training.objectives import Student

STEPS = 4


def trained_rows(folder: Path, process: int, processes: int, accumulation: int) -> torch.Tensor:
    """Rows after a few steps, where step s of process p takes batches (s * processes + p) * accumulation, ..."""
    trunk = Teacher(folder / "teacher").load(torch.float32, 2).get_decoder()
    freeze(trunk)
    student = new_tokenizer()
    start = torch.randn(len(student), 32, generator=torch.Generator().manual_seed(1)) * 0.2
    table = EmbeddingTable(trunk.get_input_embeddings().weight, torch.full((len(student),), -1), start)
    teacher = AutoTokenizer.from_pretrained(folder / "teacher")
    sides = Side("teacher", teacher, 275, 48), Side("student", student, len(student), 48)
    stream = iter(AlignedBatches(folder / "corpus.jsonl", *sides, batch_size=2, seed=0))
    every = [next(stream) for _ in range(STEPS * processes * accumulation)]
    mine = (batch for i, batch in enumerate(every) if i // accumulation % processes == process)
    options = TrainingOptions(steps=STEPS, lr=1e-2, accumulation=accumulation)
    train(trunk, trunk, Student(table), mine, 2, options, Accelerator(cpu=True))
    return table.weight()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rows = trained_rows(folder, accelerator.process_index, 2, accumulation=1)
    torch.save(rows, folder / f"rows-{accelerator.process_index}.pt")
