"""What `plan` predicts for a training step's peak memory, beside what steps took, each setting in a process of its own.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_plan.py [--tokenizer FOLDER]

Measured is what PyTorch's allocator has handed out at most in a step of `train`: the weights and rows that were there,
plus the highest sum of its own record of allocations (torch.profiler). It is exact to the byte, where the resident
memory of a process also has what malloc does not give back, what libraries keep, and here the profiler's record. That
is the column "process": the high-water mark of the same step above what the imports took.

Rows are full on both sides, as the plan has them: ids are those of real text under both tokenizers, segments are drawn.
The last lines take whole batches of real text instead, where the side of the larger vocabulary is shorter.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, Qwen3Config

from matt_fast import TrainingOptions
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.batches import Batch, collate
from matt_fast.data.chunks import make_chunks, sides_of
from matt_fast.data.documents import read_documents
from matt_fast.data.packing import Chunk
from matt_fast.initializers import initial_rows
from matt_fast.model.layers import layer_config
from matt_fast.model.precision import DTYPES
from matt_fast.model.teacher import Teacher
from matt_fast.planning.plan import plan
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training.loop import freeze, train
from matt_fast.training.objectives import trains_output
from matt_fast.training.student import make_student

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import code_text
import quickstart

SIZES = {"vocab_size": 49152, "num_hidden_layers": 12, "tie_word_embeddings": False, "max_position_embeddings": 8192}
GEMMA = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1}
QWEN = {"hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12, "num_key_value_heads": 4}
CONFIGS = {
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA, head_dim=256, sliding_window=512),
    "qwen3": Qwen3Config(**SIZES, **QWEN, head_dim=64),
    "gpt-neox": GPTNeoXConfig(**SIZES, hidden_size=768, intermediate_size=3072, num_attention_heads=12),
}
# model, objective, length, batch, precision, further options of training
SETTINGS = [
    ("smollm2", "token-distillation", 256, 4, "no", {}),
    ("smollm2", "token-distillation", 1024, 4, "no", {}),
    ("smollm2", "token-distillation", 4096, 1, "bf16", {}),
    ("smollm2", "token-distillation", 1024, 4, "no", {"checkpointing": True}),
    ("smollm2", "aim", 512, 4, "no", {}),
    ("smollm2", "aim", 4096, 1, "no", {}),
    ("smollm2", "ntp", 512, 2, "no", {}),
    ("gemma3", "token-distillation", 2048, 1, "no", {}),
    ("gemma3", "aim", 1024, 2, "bf16", {}),
    ("qwen3", "aim", 1024, 2, "no", {}),
    ("qwen3", "ntp", 256, 8, "bf16", {"accumulation": 2}),
    ("qwen3", "ntp", 256, 8, "bf16", {"checkpointing": True}),
    ("gpt-neox", "token-distillation", 1024, 2, "bf16", {}),
    ("gpt-neox", "aim+ntp", 512, 4, "no", {}),
]
REAL = [("smollm2", "token-distillation", 512, 4, "no", {}), ("smollm2", "aim", 2048, 2, "no", {})]


def folder_of(name: str, work: Path) -> Path:
    """A model's folder; those with random weights have a configuration and a tokenizer only."""
    if name == "smollm2":
        return quickstart.fetch_model()
    folder = work / name
    if not folder.exists():
        CONFIGS[name].save_pretrained(folder)
        Teacher(quickstart.fetch_model()).load_tokenizer().save_pretrained(folder)
    return folder


def full_batch(vocabulary: VocabularyPair, length: int, batch_size: int, seed: int) -> Batch:
    """Both sides full: ids of real text, segments of one to three tokens."""
    rng = np.random.default_rng(seed)
    ids = []
    for tokenizer in (vocabulary.teacher, vocabulary.student):
        found: list[int] = []
        for text in read_documents(code_text.write_corpus()[0], seed=seed):
            found += tokenizer(text, add_special_tokens=False).input_ids
            if len(found) >= length * batch_size:
                break
        ids.append(np.array(found[: length * batch_size]).reshape(batch_size, length))
    count = round(length / 1.4)
    segments = []
    for _ in range(2):
        rows = [np.sort(np.append(np.arange(count), rng.choice(count, length - count))) for _ in range(batch_size)]
        segments.append(rows)
    return collate([[Chunk(*row)] for row in zip(*ids, *segments, strict=True)], Counter())


def real_batch(vocabulary: VocabularyPair, length: int, batch_size: int, seed: int) -> Batch:
    sides = sides_of(vocabulary, length)
    chunks = make_chunks(read_documents(code_text.write_corpus()[0], seed=seed), *sides, Counter())
    long = (x for x in chunks if max(len(x.teacher_ids), len(x.student_ids)) > length - 16)
    return collate([[next(long)] for _ in range(batch_size)], Counter())


def measure(folder: str, tokenizer: str, objective, length, batch_size, precision, options, real: bool) -> None:
    """Print the peaks of the allocator and of the process, in bytes."""
    options = TrainingOptions(objective=objective, steps=1, backend="torch", **options)
    source, with_head, dtype = Teacher(folder), trains_output(options.objectives()), DTYPES[precision]
    Accelerator()
    before = peak_memory(torch.device("cpu"))
    n_layers = round(source.depth / 3)
    if (Path(folder) / "model.safetensors").exists():
        model = source.load(dtype, None if with_head else n_layers)
    else:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config if with_head else layer_config(config, n_layers), dtype=dtype)
    rows = len(model.get_input_embeddings().weight)
    vocabulary = VocabularyPair(source.load_tokenizer(), source.load_tokenizer(tokenizer), rows)
    start = initial_rows(model, vocabulary, "mean", 0)
    model = model if with_head else source.trunk(model)
    freeze(model)
    student = make_student(model, vocabulary, start, freeze_shared=True, objectives=options.objectives())
    del start
    make = real_batch if real else full_batch
    batches = [make(vocabulary, length, batch_size, seed) for seed in range(options.accumulation)]

    tensors = [*model.parameters(), *model.buffers()]
    for table in student.tables:
        tensors += [table.trainable, table.frozen_from, table.slot, table.trainable_ids]
    tensors += [] if student.head is None else [student.head.weight]
    for batch in batches:
        tensors += [batch.teacher_ids, batch.student_ids, batch.distinct_ids, *vars(batch.places).values()]
    static = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
    reset_peak_memory(torch.device("cpu"))
    with torch.profiler.profile(profile_memory=True) as profiler:
        train(model, model, student, iter(batches), n_layers, options, Accelerator())
    process = peak_memory(torch.device("cpu")) - before
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = np.array([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())])
    print(json.dumps([static + int(np.cumsum(sizes).max()), process, max(x.tokens for x in batches)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="another one than quickstart's, the model's own with 500 more tokens")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(*json.loads(given.measure))
    mebibytes = lambda size: f"{size / 2**20:,.0f}"  # noqa: E731
    with tempfile.TemporaryDirectory() as work:
        tokenizer = given.tokenizer
        if tokenizer is None:
            tokenizer = str(Path(work) / "tokenizer")
            texts = code_text.write_corpus()[2]
            code_text.extend_tokenizer(quickstart.fetch_model(), texts).save_pretrained(tokenizer)
        print("| model | objective | tokens | predicted, MiB | measured, MiB | predicted / measured | process, MiB |")
        print("|---|---|---|---|---|---|---|")
        for number, setting in enumerate(SETTINGS + REAL):
            name, objective, length, batch_size, precision, options = setting
            real, folder = number >= len(SETTINGS), str(folder_of(name, Path(work)))
            predicted = plan(
                folder, tokenizer, length=length, batch_size=batch_size, precision=precision, device="cpu",
                training=TrainingOptions(objective=objective, **options),
            )  # fmt: skip
            arguments = [folder, tokenizer, objective, length, batch_size, precision, options, real]
            command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured, process, tokens = json.loads(output.splitlines()[-1])
            more = "".join(f", {key} {value}" for key, value in options.items())
            size = f"{length:,} x {batch_size}" + (f", real text: {tokens:,}" if real else "")
            print(
                f"| {name} {'float32' if precision == 'no' else precision} | {objective}{more} | {size} "
                f"| {mebibytes(predicted.step.peak)} | {mebibytes(measured)} | {predicted.step.peak / measured:.3f} "
                f"| {mebibytes(process)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
