"""Which characters each token stands for, where a tokenizer's own offsets say too little.

Three things make the offsets of a fast tokenizer narrower than the text behind its tokens: a post-processor that trims
spaces off them, a normaliser that composes characters (of "e" and a combining accent it reports the "e" alone, of a
Hangul syllable in jamo the first), and characters that are dropped. Aligned by such offsets, an accent or a space would
come into the segment behind its own.
"""

import json
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

PAIRS_BELOW = 0x20000  # no character above is composed of two

_untrimmed: WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer | None] = WeakKeyDictionary()


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Token ids of each text, without special tokens around it, and the characters that each token stands for.

    Args:
        tokenizer: a fast tokenizer. It is not changed.
        texts: at least one.

    Returns:
        Two lists with an array for each text: ids, int64 [n], and offsets (start, end), int64 [n, 2]. Offsets are the
        tokenizer's own, not trimmed and widened: over all of a character that its normaliser changes (a letter with its
        marks, a syllable of jamo), and from the end of the tokens before, over characters that no token has.
    """
    backend = _backend_that_does_not_trim(tokenizer)
    if backend is None:
        found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
    else:
        found = backend.encode_batch(texts, add_special_tokens=False)
        ids, offsets = [x.ids for x in found], [x.offsets for x in found]
    spans = [np.array(x, np.int64).reshape(-1, 2) for x in offsets]
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None:
        spans = [_widen(x, text, normalizer) for x, text in zip(spans, texts, strict=True)]
    return [np.array(x, np.int64) for x in ids], [_close_gaps(x) for x in spans]


def _backend_that_does_not_trim(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy of the tokenizer's backend without `trim_offsets`; None if it does not trim."""
    if tokenizer not in _untrimmed:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        processor = backend["post_processor"] or {}
        trimming = [x for x in (processor, *processor.get("processors", ())) if x.get("trim_offsets")]
        for part in trimming:
            part["trim_offsets"] = False
        copy = None
        if trimming:
            copy = Tokenizer.from_str(json.dumps(backend))
            copy.no_truncation()
            copy.no_padding()
            copy.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        _untrimmed[tokenizer] = copy
    return _untrimmed[tokenizer]


def _widen(spans: NDArray[np.int64], text: str, normalizer) -> NDArray[np.int64]:
    """Spans that take all of each composed character of which they have a part."""
    if text.isascii() or not len(spans):
        return spans
    start_of, end_of = np.arange(len(text)), np.arange(1, len(text) + 1)
    verdicts: dict[str, bool] = {}
    for start, end in _composed(text):
        character = text[start:end]
        if character not in verdicts:
            # behind a letter, so that what a normaliser puts before a text does not count
            alone = normalizer.normalize_str("a") + character
            verdicts[character] = normalizer.normalize_str("a" + character) != alone
        if verdicts[character]:
            start_of[start:end], end_of[start:end] = start, end
    wide = spans[:, 0] < spans[:, 1]
    spans = spans.copy()
    spans[wide] = np.stack([start_of[spans[wide, 0]], end_of[spans[wide, 1] - 1]], axis=1)
    return spans


def _composed(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each character of the text that is written as several: a letter and what joins it."""
    joining = [ord(x) for x in set(text) if _joins(x)]
    if not joining:
        return
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    first = np.append(~np.isin(codes, joining), True)
    first[0] = True
    starts = np.flatnonzero(first)
    several = np.diff(starts) > 1
    yield from zip(starts[:-1][several].tolist(), starts[1:][several].tolist(), strict=True)


@lru_cache(maxsize=1 << 16)
def _joins(character: str) -> bool:
    """Whether normalising may compose a character with those before it, or move it among them."""
    first = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.combining(first) > 0 or first in _second_parts()


@cache
def _second_parts() -> frozenset[str]:
    """Characters that are no marks by their class, and still compose with the one before: Indic vowels, jamo."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(PAIRS_BELOW))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    jamo = map(chr, (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)))
    return frozenset({x for x in seconds if not unicodedata.combining(x)} | set(jamo))


def _close_gaps(spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spans in which a token begins where those before it end, if none before or behind it has what is between."""
    if not len(spans):
        return spans
    starts, ends = spans.T
    reach = np.maximum.accumulate(np.where(starts < ends, ends, 0))
    reach = np.concatenate([[0], reach[:-1]])
    onset = np.minimum.accumulate(starts[::-1])[::-1]
    behind_gap = reach < onset
    starts = np.where(behind_gap, reach, starts)
    ends = np.where(behind_gap & (spans[:, 0] == spans[:, 1]), reach, ends)
    return np.stack([starts, ends], axis=1)
