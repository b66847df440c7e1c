"""Two processes must do what one does with two batches per update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import TEXTS, save_tiny_model
from two_processes import trained_rows


def test_two_processes_equal_one_with_accumulation(tmp_path):
    save_tiny_model(tmp_path / "teacher")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    script = Path(__file__).with_name("two_processes.py")
    # accelerate's own launcher wants MPI for several processes without a GPU
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, env=environment, timeout=300)
    first, second = (torch.load(tmp_path / f"rows-{i}.pt") for i in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, trained_rows(tmp_path, 0, 1, accumulation=2), rtol=1e-4, atol=1e-5)
