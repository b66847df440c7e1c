"""What tokenizers make of texts, beside each other: length, what is never used, what does not come back."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.reachable import unreachable
from matt_fast.alignment.vocabulary import check_constant, check_fast, match_tokens, show_token, token_bytes
from matt_fast.support.texts import bounded_pieces, groups
from matt_fast.tokenizers.savings import SHARES, Merges, Savings

TOGETHER = 64  # pieces tokenised at a time
NAMED = 20  # tokens that a list has
# Where tokenizers treat numbers and white space differently, on which calculating and code depend.
PROBES = {
    "digits": ("7", "42", "2023", "31415", "1234567890", "3.14159", "1,000,000", "1e-10", "0x1F", "x1", "٣٤"),
    "spaces": ("a b", "a  b", "a   b", "    x", "        x", "\tx", "a\nb", "a\n\nb", "a \n", "x  \n    y", "a\u00a0b"),
}  # fmt: skip


@dataclass(frozen=True)
class TextFigures:
    """A tokenizer on a text.

    Attributes:
        bytes, characters, tokens: of the text, white space between documents left out.
        bytes_per_token, characters_per_token: the ratios.
        speedup: tokens of the first tokenizer over its own: how much faster a model should read and write the text,
            if a token costs it the same. An expectation: larger embeddings and heads cost time too.
        not_restored: pieces of the text (documents; long ones in several) that decoding does not give back.
        example: the first of them, where the two differ: (wanted, got).
    """

    bytes: int
    characters: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    speedup: float
    not_restored: int
    example: tuple[str, str] | None


@dataclass(frozen=True)
class TokenizerFigures:
    """One tokenizer.

    Attributes:
        name: what it is called.
        tokens, special: ids it has, and special ones among them.
        unreachable, unreachable_some: tokens that no text gives, see `unreachable`; the first of them.
        unseen, unseen_some: tokens, not special, that none of the texts has; the first of them.
        shared, new, missing: tokens that the first tokenizer has too, byte for byte or by role; that only this one has;
            that only the first one has.
        texts: by name.
        differences: by kind, each probe that it cuts in another way than the first: (text, the first's tokens, its).
        added: how many tokens it adds to the first by merges of its own; None where it does not go on with those of the
            first, see `no_curve`.
        enough: by text, for shares of what all added tokens save how many are enough: {"0.9": 1200, …}.
        no_curve: why there is no curve over added tokens; empty where there is.
    """

    name: str
    tokens: int
    special: int
    unreachable: int
    unreachable_some: list[str]
    unseen: int
    unseen_some: list[str]
    shared: int
    new: int
    missing: int
    texts: dict[str, TextFigures]
    differences: dict[str, list[tuple[str, str, str]]]
    added: int | None = None
    enough: dict[str, dict[str, int]] = field(default_factory=dict)
    no_curve: str = ""


@dataclass(frozen=True)
class Report:
    """What `report` found.

    Attributes:
        tokenizers: in the order given.
        curves: by tokenizer's name and text: what its added tokens save over the first.
    """

    tokenizers: list[TokenizerFigures]
    curves: dict[str, dict[str, Savings]]


@dataclass
class _Counted:
    counts: Counter = field(default_factory=Counter)
    characters: int = 0
    bytes: int = 0
    lost: int = 0
    example: tuple[str, str] | None = None


def report(
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    texts: Mapping[str, Iterable[str]],
    on_progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> Report:
    """Compare tokenizers on texts.

    Args:
        tokenizers: by name, fast ones; the others are compared with the first.
        texts: by name, documents; each is read once.
        on_progress: called with "bytes", how many were read, and None.

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: no tokenizer or text; a text without characters; tokens that cannot be read as bytes.
    """
    if not tokenizers or not texts:
        raise ValueError("tokenizers and texts: wanted at least one of each, got none")
    for name, tokenizer in tokenizers.items():
        check_fast(tokenizer, name)
        check_constant(tokenizer, name)
    counted = {name: {} for name in tokenizers}
    for text, documents in texts.items():
        for name, found in zip(
            tokenizers, _count(list(tokenizers.values()), documents, text, on_progress), strict=True
        ):
            counted[name][text] = found
    base_name, base = next(iter(tokenizers.items()))
    reference = {text: x.counts.total() for text, x in counted[base_name].items()}
    probes = _cut_probes(base)
    rows, curves = [], {}
    for name, tokenizer in tokenizers.items():
        about = _about(name, tokenizer, base, probes, counted[name], reference)
        if name != base_name:
            try:
                merges = Merges(base, tokenizer)
                curves[name] = {text: merges.savings(x.counts, x.bytes) for text, x in counted[name].items()}
            except ValueError as error:
                about["no_curve"] = str(error)
            else:
                about["added"] = len(merges.added)
                about["enough"] = {t: {str(s): x.added_for(s) for s in SHARES} for t, x in curves[name].items()}
        rows.append(TokenizerFigures(**about))
    return Report(rows, curves)


def _count(
    tokenizers: list[PreTrainedTokenizerBase], documents: Iterable[str], text: str, on_progress
) -> list[_Counted]:
    """What each tokenizer makes of the documents, which are read once."""
    found = [_Counted() for _ in tokenizers]
    for pieces in groups(filter(None, bounded_pieces(documents)), TOGETHER):
        sizes = sum(map(len, pieces)), sum(len(piece.encode()) for piece in pieces)
        for tokenizer, figures in zip(tokenizers, found, strict=True):
            encoded = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            ids, times = np.unique(np.concatenate([np.array(x, np.int64) for x in encoded]), return_counts=True)
            figures.counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
            figures.characters += sizes[0]
            figures.bytes += sizes[1]
            decoded = tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False)
            for piece, back in zip(pieces, decoded, strict=True):
                if back not in (piece, " " + piece):  # SentencePiece puts a space in front by design
                    figures.lost += 1
                    figures.example = figures.example or _difference(piece, back)
        on_progress("bytes", found[0].bytes, None)
    if not found[0].bytes or not all(x.counts for x in found):
        raise ValueError(f"{text}: wanted text, got none")
    return found


def _difference(wanted: str, got: str) -> tuple[str, str]:
    """Where two texts begin to differ, with what stands around."""
    at = next((i for i, (x, y) in enumerate(zip(wanted, got, strict=False)) if x != y), min(len(wanted), len(got)))
    part = slice(max(0, at - 10), at + 20)
    return wanted[part], got[part]


def _about(name, tokenizer, base, probes, counted: dict[str, _Counted], reference: dict[str, int]) -> dict:
    tokens = token_bytes(tokenizer)
    shared = match_tokens(tokenizer, base)
    special = {i for i, token in tokens.items() if token.kind == "special"}
    never = unreachable(tokenizer, tokens)
    unseen = sorted(tokens.keys() - special - set().union(*(x.counts.keys() for x in counted.values())))
    differences = {}
    for kind, cuts in _cut_probes(tokenizer).items():
        pairs = zip(PROBES[kind], probes[kind], cuts, strict=True)
        differences[kind] = [(text, one, other) for text, one, other in pairs if one != other]
    return {
        "name": name,
        "tokens": len(tokens),
        "special": len(special),
        "unreachable": len(never),
        "unreachable_some": [show_token(tokens[i]) for i in never[:NAMED]],
        "unseen": len(unseen),
        "unseen_some": [show_token(tokens[i]) for i in unseen[:NAMED]],
        "shared": len(shared),
        "new": len(tokens) - len(shared),
        "missing": len(token_bytes(base)) - len({x.teacher_id for x in shared.values()}),
        "texts": {text: _figures(x, reference[text]) for text, x in counted.items()},
        "differences": differences,
    }


def _figures(found: _Counted, reference: int) -> TextFigures:
    tokens = found.counts.total()
    ratios = found.bytes / tokens, found.characters / tokens, reference / tokens
    return TextFigures(found.bytes, found.characters, tokens, *ratios, found.lost, found.example)


def _cut_probes(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Each probe's tokens, as they are shown, between "│"."""
    tokens = token_bytes(tokenizer)
    cuts = {}
    for kind, texts in PROBES.items():
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        cuts[kind] = ["│".join(show_token(tokens.get(i)) for i in ids) for ids in encoded]
    return cuts
