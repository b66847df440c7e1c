"""Pictures drawn with matplotlib, which is an extra: its Figure, colours, and fonts that have the characters."""

import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from matt_fast.support.files import whole_file
from matt_fast.support.installing import install_line

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg")
DPI = 150
# Okabe and Ito's colours, which people tell apart whatever their colour vision; neighbours differ in lightness too.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7")
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
BASE_FONT = "DejaVu Sans"  # matplotlib brings it
NO_FONT = re.compile(r"Last ?Resort|Emoji", re.IGNORECASE)  # signs for whole blocks; pictures, no outlines
# Blocks of scripts whose letters change places or shapes beside others, besides those written from right to left.
SHAPED = ((0x0900, 0x0DFF), (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF))


def figure_class() -> "type[Figure]":
    """matplotlib's Figure. It draws to files without pyplot, whose windows and notebooks are the user's.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots are drawn with matplotlib: {install_line('plot')}") from error
    return Figure


def save(figure: "Figure", picture: Path) -> None:
    """Write a figure as PNG or SVG by the name's ending, whole or not at all; the same figure gives the same bytes."""
    import matplotlib

    metadata = {"Date": None} if picture.suffix.lower() == ".svg" else None
    with whole_file(picture) as part, matplotlib.rc_context({"svg.hashsalt": "matt-fast"}):
        figure.savefig(part, dpi=DPI, metadata=metadata, facecolor="white")


def tint(colour: str, share: float = 0.45) -> str:
    """A colour made paler: so much of it, the rest white. As it is given, "#rrggbb"."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


def fonts_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Font families, to be tried in this order, for all characters of the texts; and characters that none can draw.

    The latter are those that no installed font has, and those of scripts that this matplotlib cannot lay out.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager, get_font

    wanted = {ord(x) for text in texts for x in text if not x.isspace()}
    undrawn = set() if _can_shape() else {x for x in wanted if _is_shaped(x)}
    wanted -= undrawn
    families = [BASE_FONT]
    missing = wanted - get_font(fontManager.findfont(BASE_FONT)).get_charmap().keys()
    if missing:  # matplotlib keeps a list, which does not have fonts that were installed since
        known = {entry.fname for entry in fontManager.ttflist}
        for path in sorted(set(findSystemFonts()) - known):
            with suppress(OSError, RuntimeError, ValueError):  # damaged, or of a kind that it does not draw
                fontManager.addfont(path)
    for entry in sorted(fontManager.ttflist, key=lambda x: (x.style != "normal", abs(int(x.weight) - 400), x.name)):
        if not missing:
            break
        if entry.name in families or NO_FONT.search(entry.name):
            continue
        found = missing & get_font(entry.fname).get_charmap().keys()
        if found:
            families.append(entry.name)
            missing -= found
    return families, {chr(x) for x in missing | undrawn}


def _can_shape() -> bool:
    """Whether matplotlib lays text out by libraqm (from 3.11 on): joined letters, both directions, marks in place."""
    from matplotlib import ft2font

    return hasattr(ft2font, "__libraqm_version__")


def _is_shaped(code: int) -> bool:
    right_to_left = unicodedata.bidirectional(chr(code)) in ("R", "AL")
    return right_to_left or any(first <= code <= last for first, last in SHAPED)
