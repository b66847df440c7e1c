"""What each objective makes of the same time: SmolLM2-135M with a new vocabulary of 24,000 tokens, code or German.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_objectives.py [--text german] [--objectives aim,ntp] [--seeds 0]

The tokenizer replaces the model's own and is trained on the same text as the embeddings. All runs start from the same
rows (`--init`, `--init-head`); a seed is the order of the data. A run ends after so many seconds of processor time in
training, so that other work on the machine does not count; the learning rate rises over ten steps, and falls from half
of the time.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import code_text
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from german_text import german_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from matt_fast import TrainingOptions
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import sides_of
from matt_fast.data.documents import read_documents
from matt_fast.data.stream import AlignedBatches
from matt_fast.evaluation.bits_per_byte import evaluate
from matt_fast.initializers import Rows, initial_rows
from matt_fast.model.teacher import Teacher
from matt_fast.recipe import export
from matt_fast.training.loop import freeze, train
from matt_fast.training.objectives import trains_output
from matt_fast.training.state import Progress
from matt_fast.training.student import make_student

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart  # isort: skip

VOCABULARY, LAYERS, LENGTH, BATCH, PIECES = 24_000, 10, 256, 4, 15
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
RATES = {  # the best of those tried, from 3e-4 to 1e-2 for some, one for others
    "aim": 1e-3,
    "token-distillation": 3e-3,
    "ntp": 3e-3,
    "aim_star": 3e-3,
    "aim+boundary-head": 1e-3,
    "aim+ntp": 3e-3,
}


class TimeIsUp(Exception):
    pass


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    roles = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def run(
    source, vocabulary, start, corpus, objective: str, rate: float, seed: int, seconds: float
) -> tuple[Rows, Progress]:
    """Train for so many seconds."""
    set_seed(seed)
    objectives = TrainingOptions(objective=objective).objectives()
    with_head = trains_output(objectives)
    model = source.load(torch.float32, None if with_head else LAYERS)
    model = model if with_head else model.get_decoder()
    freeze(model)
    student = make_student(model, vocabulary, start, freeze_shared=True, objectives=objectives)
    batches = AlignedBatches(corpus, *sides_of(vocabulary, LENGTH), batch_size=BATCH, seed=seed).in_background()
    begin = time.process_time()

    class Options(TrainingOptions):
        def lr_at(self, step: int) -> float:
            share = (time.process_time() - begin) / seconds
            return self.lr * min(1.0, step / 10, max(0.02, 2 * (1 - share)))

    done = []

    def on_step(progress) -> None:
        done[:] = [progress]
        if time.process_time() - begin > seconds:
            raise TimeIsUp

    try:
        options = Options(objective=objective, lr=rate, steps=10**6)
        train(model, model, student, batches, LAYERS, options, Accelerator(cpu=True), on_step)
    except TimeIsUp:
        pass
    return Rows(student.input.weight(), None, None), done[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", choices=["code", "german"], default="code")
    parser.add_argument("--objectives", default=",".join(RATES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--init", default="mean")
    parser.add_argument("--init-head", default="same")
    given = parser.parse_args()
    if given.text == "code":
        corpus, held_out, texts = code_text.write_corpus()
    else:
        corpus, held_out = german_text(quickstart.CACHE)
        texts = [json.loads(line)["text"] for line in corpus.open()]
    source = Teacher(quickstart.fetch_model())
    model = source.load(torch.float32)
    rows = len(model.get_input_embeddings().weight)
    vocabulary = VocabularyPair(source.load_tokenizer(), tokenizer_of(texts), rows)
    start = initial_rows(model, vocabulary, given.init, 0, texts=texts, init_head=given.init_head)
    documents = read_documents(held_out)
    original = evaluate(model, vocabulary.teacher, documents, max_pieces=PIECES).bits_per_byte

    def score(table: Rows) -> float:
        export.replace_vocabulary(model, table)
        return evaluate(model, vocabulary.student, documents, max_pieces=PIECES).bits_per_byte

    start_name = given.init if given.init_head == "same" else f"{given.init}, head {given.init_head}"
    print(f"{given.text}: original {original:.4f}, {start_name} {score(start):.4f}", flush=True)
    print(
        "| objective | bits per byte, mean | smallest to largest | steps | tokens | loss, first and last ten steps |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    for objective in given.objectives.split(","):
        found = []
        for seed in map(int, given.seeds.split(",")):
            table, progress = run(
                source, vocabulary, start, corpus, objective, RATES.get(objective, 1e-3), seed, given.seconds
            )
            found.append(score(table))
        spread = f"{min(found):.4f} to {max(found):.4f}"
        losses = " to ".join(f"{statistics.mean(x):.3g}" for x in (progress.losses[:10], progress.losses[-10:]))
        sizes = f"{progress.step} | {progress.tokens:,} | {losses}"
        print(f"| {objective} | {statistics.mean(found):.4f} | {spread} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
