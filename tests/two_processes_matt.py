"""Run by test_matt.py in two processes: a script for the reference library."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from tiny import TEXTS
from transformers import AutoTokenizer

from matt_fast import MATT, MATTConfig
from matt_fast.modeling import LlamaForAIM

folder = Path(sys.argv[1])
config = MATTConfig(
    devices=2,
    strategy="ddp",
    accelerator="cpu",
    num_workers=0,
    lr=1e-2,
    max_epochs=1,
    batch_size=16,
    precision="32",
    dataset_output_dir=str(folder / "datasets"),
    checkpoint_output_dir=str(folder / "checkpoints"),
)
matt = MATT(config, *(AutoTokenizer.from_pretrained(folder / name) for name in ("teacher", "student")))
for force in (False, True):
    matt.prepare_dataset(Dataset.from_dict({"text": TEXTS}), 40, force_reprocess=force, num_proc=1)
mask = matt.prepare_frozen_embeddings_mask()
teacher = LlamaForAIM.from_pretrained(folder / "teacher", n_layers=2)
student = LlamaForAIM.from_pretrained(folder / "teacher", n_layers=2, frozen_embeddings_mask=mask)
matt.train(teacher, student)
result = matt.train(teacher, student)  # from where the first ended
rank = torch.distributed.get_rank()
torch.save({"rows": result.input_embeddings, "steps": matt.progress.step}, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
