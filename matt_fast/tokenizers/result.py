"""What a tokenizer that was made has, for people and programs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from matt_fast.tokenizers.source import Source


@dataclass(frozen=True)
class NewTokenizer:
    """A tokenizer that was written.

    Attributes:
        tokens, before: of its vocabulary and of the one it was made of, special tokens included.
        added: texts of the tokens that the base does not have, in the order of their ids.
        removed: texts of those that it no longer has.
        left_out: what was asked for and could not become a token, with the reason.
        bytes_per_token, bytes_per_token_before: of the first 262,144 characters of the data, if there was any.
        cut_at_marks: of these, the share of letters and marks that are marks at which words are cut.
        cut_tokens: texts of the base's tokens that no word has any more, since marks were joined with their letters.
    """

    tokens: int
    before: int | None = None
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    bytes_per_token: float | None = None
    bytes_per_token_before: float | None = None
    cut_at_marks: float = 0.0
    cut_tokens: list[str] = field(default_factory=list)


def bytes_per_token(source: Source, texts: Sequence[str]) -> float | None:
    """UTF-8 bytes of texts for each of their tokens; None if there are none."""
    tokens = sum(len(x) for x in source.plain.encode_batch_fast(list(texts), add_special_tokens=False))
    return sum(len(text.encode()) for text in texts) / tokens if tokens else None


def texts_of(source: Source, entries: Iterable[str]) -> list[str]:
    """What each entry of a vocabulary stands for; half a character is written as the replacement sign."""
    decoder = source.plain.decoder
    return [_text(decoder.decode(["x", entry]), decoder.decode(["x"])) for entry in entries]


def _text(both: str, first: str) -> str:
    """A decoder may strip a space in front of the first token."""
    return both.removeprefix(first)
