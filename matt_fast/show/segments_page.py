# ruff: noqa: RUF001 - look-alike characters are what is shown
"""A text's segments as an HTML page."""

from html import escape

from matt_fast.show.pages import PALETTE, page
from matt_fast.show.pieces import Piece, Segment, Segments
from matt_fast.support.plots import COLOURS

STYLE = f"""
.text {{ line-height: 1; }}
.segment {{ display: inline-block; vertical-align: top; margin: 2px 1px 10px; text-align: center; }}
.row {{ border: 1px solid; white-space: nowrap; padding: 3px 0; margin-top: 2px; border-radius: 3px;
       border-color: inherit; }}
.token {{ display: inline-block; padding: 0 3px; }}
.token + .token {{ border-inline-start: 1px dashed #111; }}
.number {{ font-size: 9px; color: #555; }}
{PALETTE}"""


def segments_page(found: Segments, old: str, new: str, note: str = "") -> str:
    """HTML with every segment as a block: its number, its old tokens, below them its new ones.

    Args:
        found: of `find_segments`.
        old, new: names of the tokenizers.
        note: a sentence for the reader.
    """
    direction = "rtl" if found.right_to_left else "ltr"
    tokens = [sum(len(getattr(x, side)) for x in found.segments) for side in ("old", "new")]
    body = (
        f"<p>{len(found.segments):,} segments. In each, above: <b>{tokens[0]:,} tokens of {escape(old)}</b>, below: "
        f"<b>{tokens[1]:,} of {escape(new)}</b>. ␣ is a space, ⏎ the end of a line, → a tab, ‹E3 81› the bytes of a "
        f"part of a character. {escape(note)}</p>\n"
        f'<div class="text" dir="{direction}">\n{segment_blocks(found)}\n</div>'
    )
    return page("Segments", body, STYLE)


def segment_blocks(found: Segments) -> str:
    """HTML of the segments alone, a block each; STYLE is what they look like."""
    blocks = []
    for number, segment in enumerate(found.segments, 1):
        blocks.append(_block(number, segment))
        if segment.ends_line:
            blocks.append("<br>")
    return "".join(blocks)


def _block(number: int, segment: Segment) -> str:
    rows = "".join(
        f'<div class="row c{(number - 1) % len(COLOURS)}">{"".join(map(_token, side))}</div>'
        for side in (segment.old, segment.new)
    )
    return f'<div class="segment"><div class="number">{escape(segment.label(number))}</div>{rows}</div>\n'


def _token(piece: Piece) -> str:
    return f'<span class="token" title="token {piece.id}"><bdi>{escape(piece.text)}</bdi></span>'
