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
from itertools import chain, compress
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import PROBE, token_bytes

PAIRS_BELOW = 0x20000  # no character above is composed of two
NO_TEXT = b"\xff"  # occurs in no UTF-8

_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, "_Encoder"] = WeakKeyDictionary()


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
    encoder = _encoders.get(tokenizer)
    if encoder is None or encoder.state != _state(tokenizer):
        encoder = _encoders[tokenizer] = _Encoder(tokenizer)
    found = encoder.by_bytes(texts)
    others = [number for number, result in enumerate(found) if result is None]
    encoded = encoder.backend.encode_batch([texts[x] for x in others], add_special_tokens=False)
    for number, one in zip(others, encoded, strict=True):
        flat = np.fromiter(chain.from_iterable(one.offsets), np.int64, 2 * len(one))
        found[number] = np.array(one.ids, np.int64), flat.reshape(-1, 2)
    ids, spans = zip(*found, strict=True)
    if encoder.backend.normalizer is not None:
        spans = [_widen(x, text, encoder.backend.normalizer) for x, text in zip(spans, texts, strict=True)]
    return list(ids), [_close_gaps(x) for x in spans]


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple:
    """What may change in a tokenizer that is in use."""
    return len(tokenizer), tokenizer.backend_tokenizer.encode_special_tokens


class _Encoder:
    """A copy of a tokenizer's backend that does not trim offsets, and the bytes of its tokens.

    A tokenizer takes a quarter of its time to follow each character through its steps. Where the bytes of the tokens,
    one after the other, are those of the text, they say the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.state = _state(tokenizer)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        processor = backend["post_processor"] or {}
        for part in (processor, *processor.get("processors", ())):
            if "trim_offsets" in part:
                part["trim_offsets"] = False
        self.backend = Tokenizer.from_str(json.dumps(backend))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        try:
            known = {token_id: token.bytes for token_id, token in token_bytes(tokenizer).items()}
        except ValueError:  # tokens that cannot be read as bytes
            known = {}
        self.pieces = [known.get(token_id) or NO_TEXT for token_id in range(max(known, default=-1) + 1)]
        self.lengths = np.array([len(piece) for piece in self.pieces], np.int64)
        self.by_bytes_works = bool(known)
        self.by_bytes_works = self.by_bytes([PROBE])[0] is not None

    def by_bytes(self, texts: list[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]] | None]:
        """Ids and offsets of each text of which the tokens have exactly the bytes; None for another one."""
        plain = self.backend.normalizer is None
        tried = [plain or text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts]
        if not self.by_bytes_works or not any(tried):
            return [None] * len(texts)
        encoded = iter(self.backend.encode_batch_fast(list(compress(texts, tried)), add_special_tokens=False))
        return [
            self._offsets(next(encoded).ids, text) if wanted else None
            for text, wanted in zip(texts, tried, strict=True)
        ]

    def _offsets(self, ids: list[int], text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        content = text.encode()
        if b"".join(map(self.pieces.__getitem__, ids)) != content:
            return None
        ids = np.array(ids, np.int64)
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if len(content) > len(text):
            character = np.cumsum((np.frombuffer(content, np.uint8) & 0xC0) != 0x80) - 1  # of each byte
            starts, ends = character[starts], character[ends - 1] + 1
        return ids, np.stack([starts, ends], axis=1)


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
