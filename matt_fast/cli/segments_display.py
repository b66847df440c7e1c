"""A text's segments in the terminal: old tokens above, new ones below, a colour for each segment."""

from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.style import Style
from rich.text import Text

from matt_fast.support.plots import COLOURS, tint

if TYPE_CHECKING:  # these import torch
    from matt_fast.show.pieces import Piece, Segments

STYLES = [Style(color="#000000", bgcolor=tint(colour, 0.7)) for colour in COLOURS]
LABELS = "old ", "new "


def print_segments(console: Console, found: "Segments") -> None:
    """Print them in lines as wide as the terminal; a line of the text begins a new one."""
    room = max(8, console.width - len(LABELS[0]) - 1)
    rows, used = [Text(LABELS[0], "dim"), Text(LABELS[1], "dim")], 0

    def flush() -> None:
        nonlocal rows, used
        if used:
            for row in rows:
                console.print(row, soft_wrap=True)
            console.print()
        rows, used = [Text(LABELS[0], "dim"), Text(LABELS[1], "dim")], 0

    for number, segment in enumerate(found.segments):
        sides = [_joined(segment.old), _joined(segment.new)]
        parts = [chop_cells(side, room) or [""] for side in sides]
        for at in range(max(map(len, parts))):
            texts = [part[at] if at < len(part) else "" for part in parts]
            width = max(map(cell_len, texts))
            if used and used + width > room:
                flush()
            for row, text in zip(rows, texts, strict=True):
                row.append(text + " " * (width - cell_len(text)), STYLES[number % len(STYLES)])
                row.append(" ")
            used += width + 1
        if segment.ends_line:
            flush()
    flush()


def _joined(side: "tuple[Piece, ...]") -> str:
    return "│".join(piece.text for piece in side)
