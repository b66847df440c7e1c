"""Two processes must do what one does with two batches per update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import TEXTS, save_tiny_model
from two_processes import trained_rows

# accelerate's own launcher wants MPI for several processes without a GPU
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_two(script: str, *arguments: str) -> None:
    command = [*LAUNCH, str(Path(__file__).with_name(script)), *arguments]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def test_two_processes_equal_one_with_accumulation(tmp_path):
    save_tiny_model(tmp_path / "teacher")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run_two("two_processes.py", str(tmp_path))
    first, second = (torch.load(tmp_path / f"rows-{i}.pt") for i in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, trained_rows(tmp_path, 0, 1, accumulation=2), rtol=1e-4, atol=1e-5)


def test_kernels_inside_distributed_data_parallel():
    """Gradients are the mean of those of both processes' batches."""
    run_two("two_processes_kernels.py")
