"""What making batches on the fly costs, in processor time a token: by stage, and by process for 0 to 3 workers.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_data.py [--batches 200] [--german FOLDER]

Code is the standard library's sources under SmolLM2's tokenizer and one with 500 tokens for code; German text, which
apt-get downloads to FOLDER the first time, is under SmolLM2's and a vocabulary of 32,000 trained on it. Tokens are the
student's. Rows are packed, 512 tokens long and 8 to a batch, and the kernels' tiles are planned.

Processor time does not depend on what else runs, but for caches and shared cores; the clock on the wall would say how
many cores were free. One process decides on the order of the data and one trains: however many workers there are, no
more tokens a second can come than these two let through, which the last columns say.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import code_text
import matt_kernels
import psutil
from german_text import german_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from matt_fast.data import background, chunks, stream
from matt_fast.data.batches import Batch
from matt_fast.data.chunks import Side
from matt_fast.data.packing import Packer
from matt_fast.data.stream import AlignedBatches

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart

LENGTH, ROWS = 512, 8
WARMUP = 30  # batches: behind them as many texts are under way as ever
WORKERS = (0, 1, 2)


def plan(batch: Batch) -> Batch:
    documents = {"teacher_documents": batch.teacher_documents, "student_documents": batch.student_documents}
    made = matt_kernels.aim_plan(batch.teacher_segments, batch.student_segments, **documents)
    return replace(batch, plans={("aim", None): made})


class Stages:
    """Processor time by stage, each without the stages that it calls."""

    def __init__(self):
        self.seconds: Counter = Counter()
        self.inside: list[str] = ["reading, ordering"]
        self.since = time.process_time()

    def note(self) -> None:
        now = time.process_time()
        self.seconds[self.inside[-1]] += now - self.since
        self.since = now

    def timed(self, name: str | Callable, function: Callable) -> Callable:
        def call(*arguments, **options):
            self.note()
            self.inside.append(name if isinstance(name, str) else name(*arguments))
            try:
                return function(*arguments, **options)
            finally:
                self.note()
                self.inside.pop()

        return call


def by_stage(batches: AlignedBatches, count: int) -> tuple[dict[str, float], int]:
    """Microseconds a token by stage, in this process; and the tokens."""
    stages = Stages()
    teacher = batches.teacher.tokenizer
    which = lambda tokenizer, texts: f"tokenise, {'teacher' if tokenizer is teacher else 'student'}"  # noqa: E731
    patches = [
        (chunks, "tokenize", which),
        (chunks, "align_segments_batch", "align"),
        (chunks.Cutter, "cut", "cut into chunks"),
        (Packer, "add", "pack"),
        (stream, "collate", "collate"),
        (background, "_to_bytes", "to bytes"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    chunks.Cutter.cut = lambda self, pieces: list(before[2][2](self, pieces))  # all of it inside the call
    for owner, name, stage in patches:
        setattr(owner, name, stages.timed(stage, getattr(owner, name)))
    batches.finish = stages.timed("plan tiles", plan)
    try:
        tool, tokens, begin = background._Tool(batches), 0, 0
        made = batches.batches(lambda method, items: map(getattr(tool, method), items))
        for number, packet in enumerate(itertools.islice(made, WARMUP + count)):
            if number == WARMUP:
                stages.note()
                stages.seconds.clear()
                begin = tokens
            tokens += background._open(packet, pin_memory=False).tokens
        stages.note()
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        batches.finish = plan
    in_all = tokens - begin
    return {name: seconds / in_all * 1e6 for name, seconds in stages.seconds.items()}, in_all


def processor_times() -> dict[str, float]:
    """Seconds of this process, the one that it started, and those that that one started."""
    process = psutil.Process()
    seconds = {"training": time.process_time(), "order": 0.0, "workers": 0.0}
    for child in process.children():
        seconds["order"] += sum(child.cpu_times()[:2])
        seconds["workers"] += sum(sum(x.cpu_times()[:2]) for x in child.children())
    return seconds


def by_process(batches: AlignedBatches, workers: int, count: int) -> dict:
    """Microseconds of processor time a token, by process."""
    made: Iterator[Batch] = batches.in_background(workers)
    digest, tokens = hashlib.sha256(), 0
    for _ in range(WARMUP):
        next(made)
    before = processor_times()
    for batch in itertools.islice(made, count):
        tokens += batch.tokens
    after = processor_times()
    memory = sum(x.memory_full_info().uss for x in psutil.Process().children(recursive=True))
    batch = next(made)
    for part in (batch.teacher_ids, batch.student_segments, batch.plans["aim", None].tiles):
        digest.update(part.numpy().tobytes())
    made.close()
    found = {name: (after[name] - before[name]) / tokens * 1e6 for name in after}
    return found | {"tokens": tokens, "digest": digest.hexdigest()[:12], "MiB": memory / 2**20}


def settings(german: Path | None) -> Iterator[tuple[str, Path, PreTrainedTokenizerFast]]:
    folder = quickstart.fetch_model()
    corpus, _, texts = code_text.write_corpus()
    yield "code", corpus, code_text.extend_tokenizer(folder, texts)
    if german is not None:
        german.mkdir(parents=True, exist_ok=True)
        corpus, _ = german_text(german)
        lines = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
        yield "German", corpus, AutoTokenizer.from_pretrained(folder).train_new_from_iterator(lines, 32000)


def main(count: int, german: Path | None) -> None:
    teacher = Side("teacher", AutoTokenizer.from_pretrained(quickstart.fetch_model()), 1 << 30, LENGTH)
    for name, corpus, tokenizer in settings(german):
        sides = teacher, Side("student", tokenizer, 1 << 30, LENGTH)
        batches = AlignedBatches(corpus, *sides, batch_size=ROWS, seed=0, packing=True, finish=plan)
        stages, tokens = by_stage(batches, count)
        whole = sum(stages.values())
        print(f"\n{name}, one process, {tokens:,} tokens: {whole:.2f} us a token, {1e6 / whole:,.0f} tokens/s")
        print("| stage | us a token | share |\n|---|---|---|")
        for stage, spent in sorted(stages.items(), key=lambda item: -item[1]):
            print(f"| {stage} | {spent:.2f} | {spent / whole:.0%} |")
        print("\n| workers | us a token: training | order | workers | tokens/s at most: training | order | MiB |")
        print("|---|---|---|---|---|---|---|")
        digests = set()
        for workers in WORKERS:
            found = by_process(batches, workers, count)
            digests.add(found["digest"])
            most = [f"{1e6 / found[part]:,.0f}" if found[part] else "" for part in ("training", "order")]
            spent = [f"{found[part]:.2f}" for part in ("training", "order", "workers")]
            print(f"| {workers} | {' | '.join(spent)} | {' | '.join(most)} | {found['MiB']:.0f} |", flush=True)
        print("the same batches for any number of workers" if len(digests) == 1 else f"OTHER BATCHES: {digests}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--german", type=Path)
    given = parser.parse_args()
    main(given.batches, given.german)
