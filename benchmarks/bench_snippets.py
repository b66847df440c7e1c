"""What snippets that the teacher writes are worth: SmolLM2-135M with German tokens, equal steps with and without.

    .venv/bin/python benchmarks/bench_snippets.py [--add 400] [--steps 30] [--each 3] [--ways nothing/text]

Rows and LoRA, boundary-kl+alm, 4 rows a step, one thread. "ahead of" is the difference in nats between the student's
and the teacher's log-likelihood of a new token, where it occurs in held-out text; KL is that of the next token behind
it, over the tokens that both have and the rest as one class.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart  # isort: skip
from manuals import manuals  # isort: skip

from matt_fast import HealingOptions, TrainingOptions, tokenizers, transfer
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.documents import read_documents
from matt_fast.evaluation.bits_per_byte import evaluate
from matt_fast.model.teacher import only_errors

WAYS = {  # text, per_token, snippets
    "nothing": (True, False, False),  # the start
    "text": (True, False, False),
    "text, per token": (True, True, False),
    "text, snippets": (True, False, True),
    "text, per token, snippets": (True, True, True),
    "snippets": (False, False, True),
}
BEFORE = 48  # student tokens that are read before an occurrence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default="/".join(WAYS), help="separated by /")
    parser.add_argument("--add", type=int, default=400)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=12)
    parser.add_argument("--occurrences", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = quickstart.fetch_model()
    training, german, english = manuals(quickstart.CACHE)
    print("| way | rows seen | snippets | processor s | German | English | new tokens: KL, ahead of (n) | rare ones |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "tokenizer")
        tokenizers.extend(model, tokenizer, data=training, add=given.add)
        for way in given.ways.split("/"):
            text, per_token, snippets = WAYS[way]
            begin, output = time.process_time(), Path(folder, way)
            result = transfer(
                model,
                tokenizer,
                training if text else None,
                output,
                max_length=given.length,
                batch_size=4,
                training=TrainingOptions(steps=0),
                healing=None if way == "nothing" else healing(given.steps),
                per_token=given.each if per_token else None,
                snippets=given.each if snippets else None,
                data_workers=0,
                device="cpu",
                on_message=lambda line: None,
            )
            took = time.process_time() - begin
            written = (
                "" if result.snippets is None else f"{result.snippets.snippets} of {result.snippets.generated} tokens"
            )
            figures = measure(output, model, training, (german, english), given)
            print(f"| {way} | {result.seen} of {result.new} | {written} | {took:.0f} | {figures} |", flush=True)


def healing(steps: int) -> HealingOptions:
    return HealingOptions("lora", steps=steps, lr=1e-3, rows_lr=3e-3, objective="boundary-kl+alm")


@torch.no_grad()
def measure(folder: Path, original: Path, training: Path, held_out: tuple[Path, Path], given) -> str:
    """The cells behind a run: bits per byte of both texts, and how far new tokens are from the teacher."""
    with only_errors():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval() for x in (folder, original)
        )
    pair = VocabularyPair(*map(AutoTokenizer.from_pretrained, (original, folder)), teacher.config.vocab_size)
    cells = []
    for text in held_out:
        found = evaluate(student, pair.student, read_documents(text), max_pieces=given.pieces)
        cells.append(f"{found.bits_per_byte:.4f}")
    counts = Counter(i for ids in encoded(pair, training) for i in ids)
    new = set(pair.new)
    places = [(ids, at) for ids in encoded(pair, held_out[0]) for at in range(1, len(ids)) if ids[at] in new]
    rare = [x for x in places if counts[x[0][x[1]]] < 10]
    for some in (places, rare):
        some = random.Random(0).sample(some, min(len(some), given.occurrences))
        kl, ahead = torch.tensor([distance(student, teacher, pair, *x) for x in some]).reshape(-1, 2).mean(0).tolist()
        cells.append(f"{kl:.3f}, {ahead:+.2f} ({len(some)})")
    return " | ".join(cells)


def encoded(pair: VocabularyPair, file: Path) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    return pair.student(texts, add_special_tokens=False)["input_ids"]


def distance(student, teacher, pair: VocabularyPair, ids: list[int], at: int) -> tuple[float, float]:
    """(KL of what comes behind the token `ids[at]`, its log-likelihood less that of the teacher's pieces)."""
    token, before = ids[at], ids[max(0, at - BEFORE) : at]
    spelled = [y for x in before for y in (pair.subtokens[x] if x in pair.subtokens else [pair.matches[x].teacher_id])]
    pieces = pair.subtokens[token]
    ours = student(torch.tensor([[*before, token]])).logits[0].log_softmax(-1)
    theirs = teacher(torch.tensor([spelled + pieces])).logits[0].log_softmax(-1)
    shared = sorted(pair.matches)
    theirs_behind = with_rest(theirs[-1, [pair.matches[x].teacher_id for x in shared]])
    kl = (theirs_behind.exp() * (theirs_behind - with_rest(ours[-1, shared]))).sum()
    steps = range(len(spelled) - 1, len(spelled) - 1 + len(pieces))
    ahead = ours[len(before) - 1, token] - theirs[list(steps), pieces].sum()
    return float(kl), float(ahead)


def with_rest(logs: torch.Tensor) -> torch.Tensor:
    return torch.cat([logs, torch.log1p(-logs.exp().sum().clamp(max=1 - 1e-6))[None]])


if __name__ == "__main__":
    main()
