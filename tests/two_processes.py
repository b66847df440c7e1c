"""Run by test_processes.py in two processes: steps with whole and with spread layers, and what the processes send."""

import itertools
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from tiny import new_tokenizer
from transformers import AutoTokenizer

from matt_fast import HealingOptions, TrainingOptions, transfer
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.batches import Chunk, collate
from matt_fast.data.chunks import Side
from matt_fast.data.stream import AlignedBatches
from matt_fast.initializers import Rows
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.finish import _result
from matt_fast.training.layers import TrainedLayers
from matt_fast.training.loop import freeze, train
from matt_fast.training.objectives import trains_output
from matt_fast.training.sharding import shard_layers
from matt_fast.training.sides import Student
from matt_fast.training.state import TrainingState
from matt_fast.training.student import make_student

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from traffic import Traffic

STEPS, LAYERS = 3, 2
CASES = {  # what is trained, and whether its layers are spread over the processes
    "whole layers": ("token-distillation", False),
    "aim": ("aim", True),
    "packed": ("token-distillation", True),
    "checkpointed": ("ntp", True),
    "healed": ("ntp", True),
}
VOCABULARIES = 50_000, 388_000
LENGTH, BATCH = 64, 2


def frozen(folder: Path, objective: str, accelerator: Accelerator, shard: bool):
    """The model as a step takes it, before it is spread."""
    source, with_head = Teacher(folder / "teacher"), trains_output((objective,))
    others = shard and not accelerator.is_main_process
    model = (source.outline if others else source.load)(torch.float32, None if with_head else LAYERS)
    model = model if with_head else source.trunk(model)
    freeze(model)
    return model


def trained(folder: Path, case: str, process: int, processes: int, shard: bool) -> dict[str, torch.Tensor]:
    """Rows and adapters after a few steps; those of several processes are to equal one's with accumulation."""
    torch.manual_seed(0)
    accelerator, accumulation, objective = Accelerator(cpu=True), 2 // processes, CASES[case][0]
    chosen = {"packing": case == "packed", "checkpointing": case == "checkpointed"}
    options = TrainingOptions(objective=objective, steps=STEPS, lr=1e-2, accumulation=accumulation, **chosen)
    model, layers = frozen(folder, objective, accelerator, shard), None
    if case == "healed":
        spread = (lambda x: shard_layers(x, accelerator)) if shard else None
        layers = TrainedLayers(model, HealingOptions("lora", rank=3, lr=1e-2), spread)
    elif shard:
        shard_layers(model, accelerator)
    if shard:
        own = {name: x.to_local().numel() for name, x in model.named_parameters() if hasattr(x, "to_local")}
        assert len(own) == 9 * (LAYERS if not trains_output((objective,)) else 3)
        assert all(2 * own[name] == x.numel() for name, x in model.named_parameters() if name in own)
    teacher, new = AutoTokenizer.from_pretrained(folder / "teacher"), new_tokenizer()
    start = torch.randn(len(new), 32, generator=torch.Generator().manual_seed(1)) * 0.2
    rows = Rows(start, None, None, None)
    student = make_student(model, VocabularyPair(teacher, new, 275), rows, True, (objective,))
    state = TrainingState.begin(student, options, layers)
    sides = Side("teacher", teacher, 275, 48), Side("student", new, len(new), 48)
    stream = AlignedBatches(folder / "corpus.jsonl", *sides, batch_size=2, seed=0, packing=options.packing)
    every = [batch for batch, _ in zip(stream, range(2 * STEPS), strict=False)]
    mine = (batch for i, batch in enumerate(every) if i // accumulation % processes == process)
    train(model, model if layers is None else layers.student, state, mine, LAYERS, options, accelerator)
    return {"rows": student.input.trainable} | ({} if layers is None else layers.weights())


def sent(folder: Path, accelerator: Accelerator, rows: int, shard: bool) -> int:
    """Bytes of a step with full batches, in which each process has other ids."""
    model = frozen(folder, "token-distillation", accelerator, shard)
    model = shard_layers(model, accelerator) if shard else model
    table = EmbeddingTable(model.get_input_embeddings().weight, torch.full((rows,), -1), torch.zeros(rows, 32))
    count, segments = BATCH * LENGTH, np.arange(LENGTH) * 2 // 3
    ids = (np.arange(count) + count * accelerator.process_index).reshape(BATCH, LENGTH)
    batch = collate([[Chunk(x % 200, x, segments, segments)] for x in ids], Counter())
    options = TrainingOptions(objective="token-distillation", steps=1)
    with Traffic() as traffic:
        train(model, model, Student(table), iter([batch]), LAYERS, options, accelerator)
    return sum(traffic.sent.values())


def run(
    folder: Path, name: str, shard: bool = True, stop: int | None = None, resume: bool = False, lr: float = 1e-2
) -> None:
    """A transfer with everything that goes on beside the steps; `stop` counts those of both stages."""
    steps = itertools.count(1)

    def on_step(progress) -> None:
        if next(steps) == stop:
            raise KeyboardInterrupt

    training = TrainingOptions(objective="aim", steps=4, lr=lr, shard=shard)
    healing = HealingOptions("lora", steps=2, rank=3, objective="ntp", lr=lr, rows_lr=lr)
    given = {
        "max_length": 48,
        "batch_size": 2,
        "n_layers": LAYERS,
        "device": "cpu",
        "data_workers": 0,
        "completions": 0,
    }
    given |= {"eval_data": folder / "held.txt", "validate_every": 2, "checkpoint_every": 1, "resume": resume}
    models = folder / "teacher", folder / "new", folder / "corpus.jsonl", folder / name
    quiet = {"on_message": lambda message: None, "on_step": on_step}
    transfer(*models, training=training, healing=healing, **given, **quiet)


def read_late(*given):
    """A process that looks at the run when the main one could have removed what it reads, as on a slow disk."""
    time.sleep(4)
    return _result(*given)


if __name__ == "__main__":
    folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
    found = {}
    for case, (_, shard) in CASES.items():
        found[case] = trained(folder, case, accelerator.process_index, 2, shard)
    torch.save(found, folder / f"found-{accelerator.process_index}.pt")
    figures = {str(rows): sent(folder, accelerator, rows, shard=False) for rows in VOCABULARIES}
    figures["sharded"] = sent(folder, accelerator, 1000, shard=True)
    with patch("matt_fast.recipe.finish._result", read_late if accelerator.process_index else _result):
        run(folder, "at-once")
    for name, stop, shard, lr in (("stopped", 3, True, 1e-2), ("changed", 6, False, 1e-2), ("spoiled", 3, True, 3.0)):
        with suppress(KeyboardInterrupt):
            run(folder, name, stop=stop, lr=lr)
        run(folder, name, shard, resume=True, lr=lr)
    if accelerator.is_main_process:
        (folder / "sent.json").write_text(json.dumps(figures))
