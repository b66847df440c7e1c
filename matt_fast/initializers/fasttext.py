"""Vectors of tokens by fastText: two are alike where the tokens are used alike in a text."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import check_fast, vocabulary_rows
from matt_fast.support.installing import install_line
from matt_fast.support.texts import bounded_pieces, groups

TOKENISE_TOGETHER = 16
BUCKETS = 2_000_000  # fastText's own number of rows for character n-grams
# fastText 0.9.3 fills a tenth of its rows for each thread and leaves the rest as the allocator gives them. From 32 MiB
# these are new pages, all zeros; below, remains of earlier objects: two runs then differ, and some diverge.
MIN_DIM = 8
# fastText splits at these characters and reads "</s>" as the end of a line. An entry with one of them is written with
# the mark (a private-use character) and a letter instead; a mark in an entry is doubled, so that no two are confused.
MARK = "\ue000"
ESCAPES = str.maketrans({c: MARK + letter for c, letter in zip(" \n\r\t\v\f\0" + MARK, "snrtvf0" + MARK, strict=True)})


class TokenVectors(NamedTuple):
    """Vectors of some tokens of a vocabulary.

    Attributes:
        ids: [n] int64, ascending.
        vectors: [n, dim] float32.
        counts: [vocabulary rows] int64: how often each token occurs in the text, those without a vector included.
    """

    ids: torch.Tensor
    vectors: torch.Tensor
    counts: torch.Tensor


def fasttext_vectors(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dim: int = 300,
    epochs: int = 3,
    min_count: int = 10,
    seed: int = 0,
) -> TokenVectors:
    """Train fastText on text tokenised with the new tokenizer: a vector for each token that occurs often enough.

    The options are those of deepfocus (continuous bag of words, 10 negatives, 3 epochs, 10 occurrences); so is the
    result, to the bit, for a byte-level vocabulary and seed 0. A word is the token's own entry in the vocabulary, so
    that fastText's character n-grams keep their sense; what fastText would split or read otherwise is escaped, so that
    different ids are always different words.

    A token with fewer than `min_count` occurrences gets no vector and is left to the caller. fastText would make one
    from character n-grams, in part random numbers that no training has touched.

    The same texts, options and build of fastText give the same vectors to the bit: it is given one thread, since
    several race.

    Args:
        texts: documents, in order; one line each for fastText.
        tokenizer: a fast tokenizer, the new one.
        dim: of the vectors, at least 8. fastText reserves 2 million rows of it for n-grams (2.4 GB at 300); it
            touches a tenth, and what training reaches.
        epochs: passes over the text.
        min_count: occurrences that a token needs.
        seed: of fastText's random numbers.

    Raises:
        ImportError: fastText is missing.
        TypeError: the tokenizer is not a fast one.
        ValueError: an option that is too small, or no token that occurs often enough.
        RuntimeError: training diverged.
    """
    bindings = _fasttext()
    check_fast(tokenizer, "tokenizer")
    least = {"dim": (dim, MIN_DIM), "epochs": (epochs, 1), "min_count": (min_count, 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name}: wanted at least {minimum}, got {value}")
    words = {token_id: _word(entry) for entry, token_id in tokenizer.get_vocab().items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        counts = _write_words(texts, tokenizer, words, file)
        if counts.max() < min_count:
            raise ValueError(
                f"texts: wanted a token with {min_count} occurrences (min_count), got at most {counts.max()}"
            )
        model = _train(bindings, file, dim, epochs, min_count, seed)
    ids = [token_id for token_id in sorted(words) if counts[token_id] >= min_count]
    vectors = np.empty((len(ids), dim), np.float32)
    vector = bindings.Vector(dim)
    for row, token_id in enumerate(ids):
        model.getWordVector(vector, words[token_id])
        vectors[row] = vector
    if not np.isfinite(vectors).all():
        raise RuntimeError("fastText diverged: its vectors are not finite")
    return TokenVectors(torch.tensor(ids), torch.from_numpy(vectors), torch.from_numpy(counts))


def _fasttext():
    """fastText's C++ bindings: its Python function for unsupervised training takes no seed."""
    try:
        import fasttext_pybind
    except ImportError as error:
        raise ImportError(
            f"focus, omp-self and wechsel need fastText (it takes a C++ compiler): {install_line('focus')}"
        ) from error
    return fasttext_pybind


def _train(bindings, file: Path, dim: int, epochs: int, min_count: int, seed: int):
    """A fastText model of the words in `file`."""
    arguments = bindings.args()
    chosen = {
        "input": str(file),
        "model": bindings.model_name.cbow,
        "loss": bindings.loss_name.ns,
        "neg": 10,
        "lr": 0.05,
        "dim": dim,
        "epoch": epochs,
        "minCount": min_count,
        "bucket": BUCKETS,
        "seed": seed % (2**31 - 2) + 1,  # as what its generator reads 0, too
        "thread": 1,
        "label": " ",  # no word can begin with it: the default would take a token "__label__" for a label
        "verbose": 0,
        "saveOutput": False,
    }
    for name, value in chosen.items():
        setattr(arguments, name, value)
    model = bindings.fasttext()
    bindings.train(model, arguments)
    return model


def _word(entry: str) -> str:
    """An entry of the vocabulary as a word of fastText, different for different entries."""
    return f"{MARK}:{entry}" if entry in ("", "</s>") else entry.translate(ESCAPES)


def _write_words(texts: Iterable[str], tokenizer, words: dict[int, str], file: Path) -> np.ndarray:
    """Write the tokens of each text in a line. Returns how often each id occurs, [vocabulary rows] int64."""
    counts = np.zeros(vocabulary_rows(words), np.int64)
    pieces = filter(None, bounded_pieces(texts))
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for together in groups(pieces, TOKENISE_TOGETHER):
            for ids in tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"]:
                out.write(" ".join([words[token_id] for token_id in ids]) + "\n")
                counts += np.bincount(np.array(ids, np.int64), minlength=len(counts))
    return counts
