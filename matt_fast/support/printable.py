"""Text from files, made safe to print: a name or token must not be able to move the cursor or colour the screen."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

KEPT = "\n\t"
# Controls (escape sequences begin with one), halves of surrogate pairs (of file names that are not UTF-8), separators.
UNSAFE = ("Cc", "Cs", "Zl", "Zp")
# They turn the direction of what stands behind them, so that a line reads as another one.
BIDI = frozenset(map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))

SIGNS = {" ": "␣", "\n": "⏎", "\t": "→", "\u00a0": "⍽"}


def short_names(places: Sequence[str]) -> list[str]:
    """As many last parts of each path as tell it from the others; the paths themselves where some are equal."""
    parts = [Path(place).parts for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(x[-count:]) for x in parts]
        if all(names) and len(set(names)) == len(names):
            return names
    return list(places)


def some(things: Sequence, most: int = 5) -> str:
    """The first of some things as Python writes them, and … where there are more."""
    return ", ".join(map(repr, things[:most])) + (" …" if len(things) > most else "")


def printable(text: str) -> str:
    r"""The text with control characters written as escapes (`\x1b`); line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(x) if x not in KEPT and _is_unsafe(x) else x for x in text)


def visible(text: str) -> str:
    r"""The text with every white space and control seen: ␣ ⏎ →, escapes for others; a mark that begins it has a ◌."""
    if text.isascii() and text.isprintable():
        return text.replace(" ", SIGNS[" "])
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "\N{DOTTED CIRCLE}" + text
    return "".join(SIGNS.get(x) or (_escaped(x) if _is_hidden(x) else x) for x in text)


def _is_hidden(character: str) -> bool:
    # formats join, part or colour what is beside them; private and unassigned ones look like anything
    return unicodedata.category(character) in (*UNSAFE, "Cf", "Co", "Cn", "Zs")


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in UNSAFE or character in BIDI


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
