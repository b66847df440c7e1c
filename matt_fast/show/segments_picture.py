"""A text's segments as a picture, in the manner of the paper's Figure 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matt_fast.show.pieces import Segment, Segments
from matt_fast.support.plots import COLOURS, DPI, GREY, figure_class, fonts_for, tint

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

# In points.
WIDTH, MARGIN = 720, 12
SIZE, SMALL = 10, 6.5
PAD, GAP = 3, 5  # inside a token, between segments
ROW, BETWEEN, NUMBER, LINE = 17, 3, 10, 14  # a token, the two sides, the number above, the space below
BASELINE = 5.3  # of a token's text, above its bottom
LABEL = 34
MAX_SEGMENTS = 1500  # a picture of more is too high to be looked at


@dataclass(frozen=True)
class _Placed:
    number: int
    segment: Segment
    line: int
    left: float
    width: float  # of the wider side


def segments_figure(found: Segments) -> "Figure":
    """A figure of the segments, each with its number, its old tokens, below them its new ones.

    Segments go from right to left where the text does. Lines of the text begin lines of the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: too many segments; characters that no installed font has.
    """
    if len(found.segments) > MAX_SEGMENTS:
        raise ValueError(
            f"text: wanted at most {MAX_SEGMENTS:,} segments in a picture, got {len(found.segments):,}; write .html"
        )
    figure_of = figure_class()
    from matplotlib.patches import FancyBboxPatch, Rectangle
    from matplotlib.transforms import Affine2D

    drawn = [x.label(0) for x in found.segments]
    drawn += [piece.text for x in found.segments for side in (x.old, x.new) for piece in side]
    families, missing = fonts_for(drawn)
    if missing:
        shown = " ".join(sorted(missing)[:8])
        raise ValueError(
            f"output: wanted fonts that can draw {shown} ({len(missing)} characters of the text that none here can; "
            "fonts-noto-core, for example, has most scripts, fonts-noto-cjk Chinese, Japanese and Korean); or write "
            ".html, which the browser's fonts draw"
        )
    figure = figure_of(figsize=(WIDTH / 72, 1), dpi=DPI)
    measure = _measure(figure, families)
    placed, lines = _place(found.segments, measure)
    height = 2 * MARGIN + lines * (NUMBER + 2 * ROW + BETWEEN + LINE) - LINE
    figure.set_size_inches(WIDTH / 72, height / 72)
    points = Affine2D().scale(1 / 72) + figure.dpi_scale_trans

    def text(x, y, what, size=SIZE, colour="black", **more):
        figure.text(x, y, what, fontsize=size, color=colour, family=families, parse_math=False, transform=points,
                    va="baseline", **more)  # fmt: skip

    def top_of(line: int) -> float:
        return height - MARGIN - line * (NUMBER + 2 * ROW + BETWEEN + LINE)

    for line in range(lines):
        for row, name in enumerate(("old", "new")):
            x = WIDTH - MARGIN if found.right_to_left else MARGIN
            y = top_of(line) - NUMBER - row * (ROW + BETWEEN) - ROW + BASELINE
            text(x, y, name, 8, GREY, ha="right" if found.right_to_left else "left")
    for spot in placed:
        colour, top = COLOURS[(spot.number - 1) % len(COLOURS)], top_of(spot.line)

        def across(x: float, width: float) -> float:
            return WIDTH - x - width if found.right_to_left else x

        text(
            across(spot.left, spot.width) + spot.width / 2,
            top - NUMBER + 3,
            spot.segment.label(spot.number),
            SMALL,
            GREY,
            ha="center",
        )
        for row, side in enumerate((spot.segment.old, spot.segment.new)):
            widths = _widths([measure(x.text) for x in side], spot.width)
            x, bottom = spot.left, top - NUMBER - row * (ROW + BETWEEN) - ROW
            for piece, width in zip(side, widths, strict=True):
                left = across(x, width)
                box = (left + 0.6, bottom + 0.6), width - 1.2, ROW - 1.2
                style = {"facecolor": tint(colour), "edgecolor": colour, "linewidth": 0.9, "transform": points}
                rounded = FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=2.5", **style)
                figure.add_artist(rounded if width > 6 else Rectangle(*box, **style))
                text(left + width / 2, bottom + BASELINE, piece.text, ha="center")
                x += width
    return figure


def _measure(figure: "Figure", families: list[str]):
    """A function: the width of a token's box in points."""
    from functools import cache

    from matplotlib.font_manager import FontProperties

    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else _agg(figure)
    font = FontProperties(family=families, size=SIZE)

    @cache
    def width(text: str) -> float:
        return renderer.get_text_width_height_descent(text, font, False)[0] * 72 / DPI + 2 * PAD

    return width


def _agg(figure: "Figure"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return FigureCanvasAgg(figure).get_renderer()


def _place(segments: tuple[Segment, ...], measure) -> tuple[list[_Placed], int]:
    """Where segments go, and how many lines they take. What is wider than a line is cut into parts of its own line."""
    placed, line, left = [], 0, MARGIN + LABEL
    room = WIDTH - MARGIN - left
    for number, segment in enumerate(segments, 1):
        for part in _parts(segment, measure, room):
            label = (measure(segment.label(number)) - 2 * PAD) * SMALL / SIZE
            width = max(label, *(sum(measure(x.text) for x in side) for side in (part.old, part.new)))
            if left > MARGIN + LABEL and left + width > WIDTH - MARGIN:
                line, left = line + 1, MARGIN + LABEL
            placed.append(_Placed(number, part, line, left, width))
            left += width + GAP
        if segment.ends_line:
            line, left = line + 1, MARGIN + LABEL
    return placed, (line if placed and left == MARGIN + LABEL else line + 1)


def _parts(segment: Segment, measure, room: float) -> Iterator[Segment]:
    """The segment, or, where it is wider than a line, parts of it that are not."""
    from matt_fast.show.pieces import Piece

    def cut(side):
        for piece in side:
            text = piece.text
            while len(text) > 1 and measure(text) > room:
                most = next(n for n in range(len(text) - 1, 0, -1) if n == 1 or measure(text[:n]) <= room)
                yield Piece(piece.id, text[:most])
                text = text[most:]
            yield Piece(piece.id, text)

    def rows(side):
        row, width = [], 0.0
        for piece in cut(side):
            if row and width + measure(piece.text) > room:
                yield tuple(row)
                row, width = [], 0.0
            row.append(piece)
            width += measure(piece.text)
        yield tuple(row)

    old, new = list(rows(segment.old)), list(rows(segment.new))
    for at in range(max(len(old), len(new))):
        yield Segment(segment.text, *(rows_[at] if at < len(rows_) else () for rows_ in (old, new)))


def _widths(natural: list[float], width: float) -> list[float]:
    """Widths of a side's tokens: what the other side has more is shared out among them."""
    more = (width - sum(natural)) / max(1, len(natural))
    return [x + more for x in natural]
