"""Curves as inline SVG, with the values that the page shows at a pointer or by the arrow keys."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from matt_fast.report.curves import Line, in_bins, smoothed, spans_decades

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 30
BINS = 200  # points of a line: about one for two pixels
COLOURS = 6  # of page.css
DENSE = 25  # points, up to which each has a mark
TICKS = 5
SHARE = 0.05  # of the range, that stays free above and below


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    logarithmic: bool
    start: float
    end: float

    def at(self, values):
        low, high = (math.log(x) if self.logarithmic else x for x in (self.low, self.high))
        values = np.log(np.maximum(values, 1e-300)) if self.logarithmic else np.asarray(values, dtype=float)
        return self.start + (values - low) / ((high - low) or 1) * (self.end - self.start)


def chart(title: str, lines: Sequence[Line], unit: str, note: str = "") -> str:
    """A figure of some curves over the steps.

    Args:
        title: plain text.
        lines: those with no point are left out; "" is returned where none is left.
        unit: what the values are, plain text.
        note: a sentence below, plain text.
    """
    lines = [x for x in lines if len(x.curve[0])]
    if not lines:
        return ""
    binned = [in_bins(x.curve, BINS) for x in lines]
    across, down = _axes(lines, binned)
    parts = [_grid(across, down)]
    for number, (line, values) in enumerate(zip(lines, binned, strict=True)):
        parts.append(_drawn(line, values, across, down, f"s{number % COLOURS}"))
    series = [
        {"name": x.name, "x": _short(steps, 6), "y": _short(mean, 5)}
        for x, (steps, mean, *_) in zip(lines, binned, strict=True)
    ]
    places = {
        "x": [across.low, across.high, across.start, across.end],
        "y": [down.low, down.high, down.start, down.end],
        "log": down.logarithmic,
        "series": series,
    }
    last = "; ".join(f"{x['name'] or unit} ends at {x['y'][-1]:g}" for x in series)
    label = escape(f"{title}, {unit}, over {across.high:g} steps: {last}")
    legend = "".join(
        f'<li class="s{number % COLOURS}"><i></i>{escape(x.name)}</li>' for number, x in enumerate(lines) if x.name
    )
    return (
        f'<figure class="chart"><figcaption><h4>{escape(title)}</h4>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + "</figcaption>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{label}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>\n'
        f'<output class="readout">{escape(last)}</output>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + f'<script type="application/json">{as_json(places)}</script></figure>\n'
    )


def as_json(value: object) -> str:
    """JSON that can stand in a <script> element, whatever its texts are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _axes(lines: Sequence[Line], binned: Sequence[Sequence[NDArray]]) -> tuple[_Axis, _Axis]:
    steps = np.concatenate([x[0] for x in binned])
    values = np.concatenate([part for x in binned for part in x[2:]])
    levels = [x.level for x in lines if x.level is not None]
    low, high = (float(f([f(values), *levels])) for f in (min, max))
    logarithmic = spans_decades(low, high) and any(x.noisy for x in lines)
    if logarithmic:
        room = (high / low) ** SHARE
        low, high = low / room, high * room
    else:
        room = (high - low) * SHARE or abs(high) * SHARE or 1.0
        low, high = low - room, high + room
    across = _Axis(float(min(0.0, steps.min())), float(max(1.0, steps.max())), False, LEFT, WIDTH - RIGHT)
    return across, _Axis(low, high, logarithmic, HEIGHT - BOTTOM, TOP)


def _grid(across: _Axis, down: _Axis) -> str:
    parts = []
    for value in ticks(down.low, down.high, down.logarithmic):
        y = float(down.at(value))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for value in ticks(across.low, across.high, whole=True):
        x = float(across.at(value))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:,.0f}</text>')
    base = HEIGHT - BOTTOM
    return "".join(parts) + f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'


def ticks(low: float, high: float, logarithmic: bool = False, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`: about TICKS of them, or 1, 2 and 5 of each decade."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(decades) <= TICKS - 1 else (1,)
        found = [digit * 10.0**power for power in decades for digit in digits]
        found = [x for x in found if low <= x <= high]
        return found[:: -(-len(found) // (TICKS + 2)) or 1] or [low, high]
    rough = (high - low) / TICKS
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(x for x in (1, 2, 5, 10) if x * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _drawn(line: Line, values: Sequence[NDArray], across: _Axis, down: _Axis, colour: str) -> str:
    steps, mean, low, high = values
    x = across.at(steps)
    parts = []
    if line.level is not None:
        y = float(down.at(line.level))
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if line.noisy:
        if len(mean) < len(line.curve[0]):
            top, bottom = _points(x, down.at(high)), _points(x[::-1], down.at(low[::-1]))
            parts.append(f'<path class="band" d="M{top}L{bottom}z"/>')
        parts.append(f'<path class="pale" d="M{_points(x, down.at(mean))}"/>')
        mean = smoothed(mean)
    y = down.at(mean)
    parts.append(f'<path class="line" d="M{_points(x, y)}"/>')
    if len(steps) <= DENSE:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in zip(x, y, strict=True)]
    return f'<g class="{colour}">{"".join(parts)}</g>'


def _points(x: NDArray, y: NDArray) -> str:
    return "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _short(values: NDArray, digits: int) -> list[float]:
    return [float(f"{x:.{digits}g}") for x in values]
