"""Texts of any length in pieces and groups that take a bounded memory when they are tokenised."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeVar

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no character
MAX_CHARACTERS = 1 << 20  # of a piece, and of pieces that are tokenised together

T = TypeVar("T")


class Joined:
    """Several iterables as one, which can be iterated again if they can."""

    def __init__(self, *parts: Iterable[T]):
        self.parts = parts

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self.parts)


def bounded_pieces(documents: Iterable[str | None], most: int = MAX_CHARACTERS) -> Iterator[str]:
    """The documents, and, of those that are very long, pieces that end with a line where they can.

    A document that is None, empty or white space gives "": it has no text.

    Args:
        documents: texts.
        most: characters of a piece.
    """
    for document in documents:
        if not document or document.isspace():
            yield ""
        else:
            yield from rejoin([document], most)


def rejoin(blocks: Iterable[str], most: int = MAX_CHARACTERS) -> Iterator[str]:
    """A text that comes in blocks, cut into pieces of at most `most` characters, behind line ends where there are any.

    No more of it is held than a piece and a block. Where the blocks end does not matter.
    """
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > most:
            end = text.rfind("\n", start, start + most) + 1 or start + most
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def groups(texts: Iterable[str], together: int, most: int = MAX_CHARACTERS) -> Iterator[list[str]]:
    """Texts that are tokenised at a time: so many, and no more characters than memory should hold.

    Args:
        texts: pieces.
        together: texts of a group, at most.
        most: characters of a group of several.
    """
    group: list[str] = []
    characters = 0
    for text in texts:
        if group and characters + len(text) > most:
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
        if len(group) == together:
            yield group
            group, characters = [], 0
    if group:
        yield group


def up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first texts, so many characters of them in all; the last one may be cut."""
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
