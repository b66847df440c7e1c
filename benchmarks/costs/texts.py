"""Real text under two real tokenizers."""

import functools
import gzip
import pydoc_data.topics
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from real_tokenizers import REAL_TOKENIZERS, cached, standard_library
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from matt_fast.alignment.segments import align_segments


def man_pages(language: str) -> list[str]:
    """Manual pages of this machine without their markup; none on many machines."""
    texts = []
    for file in sorted(Path("/usr/share/man", language).glob("man*/*.gz")):
        lines = gzip.decompress(file.read_bytes()).decode("utf-8", "ignore").splitlines()
        lines = (x for x in lines if x and x[0] not in ".'\\")
        text = re.sub(r"\\f\[?[A-Z]+\]?|\\&|\\,|\\/", "", "\n".join(lines)).replace("\\-", "-")
        texts.append(text)
    return texts


def byte_bpe(texts: list[str], size: int = 24_000):
    """A new tokenizer trained on `texts`, as one would for a language or for code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Pair:
    """Teacher tokenizer, student tokenizer, and the text both read: held out where the student's was trained."""

    name: str
    teacher: str
    student: str
    texts: Callable[[], list[str]]
    trained: bool = True

    def segments(self, length: int) -> list[torch.Tensor]:
        """Ids [1, n] of one document of at most `length` student tokens, cut behind a segment."""
        texts = self.texts()
        held_out = texts[::4] if self.trained else texts
        make = functools.partial(byte_bpe, [x for i, x in enumerate(texts) if i % 4])
        student = cached(f"cost-{self.student}", make) if self.trained else REAL_TOKENIZERS[self.student]()
        text = "\n\n".join(held_out)[: 8 * length]
        sides = [tokenized(x, text) for x in (REAL_TOKENIZERS[self.teacher](), student)]
        ids = align_segments(*(x[0] for x in sides), *(x[1] for x in sides))
        if len(ids[1]) < length:
            raise LookupError(f"{self.name}: the text must give {length} student tokens; got {len(ids[1])}")
        last = ids[1][:length].max() - 1
        stops = [int(np.flatnonzero(x == last).max()) + 1 for x in ids]
        return [torch.as_tensor(x[:stop])[None] for x, stop in zip(ids, stops, strict=True)]


def tokenized(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    return np.array(found["offset_mapping"]), np.array(found["special_tokens_mask"])


def prose() -> list[str]:
    """English: the language reference that Python carries for help()."""
    return list(pydoc_data.topics.topics.values())


PAIRS = (
    Pair("tekken to 24k of Python, code", "tekken", "python-24k", standard_library),
    Pair("tekken to 24k of German, manuals", "tekken", "german-24k", lambda: man_pages("de")),
    Pair("mistral v3 to 24k of Russian, manuals", "sentencepiece-bpe", "russian-24k", lambda: man_pages("ru")),
    Pair("mistral v3 to tekken, English", "sentencepiece-bpe", "tekken", prose, trained=False),
)
