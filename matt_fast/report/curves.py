"""A run's curves from its metrics.jsonl: read, put together in bins, smoothed, drawn as a picture.

charts.py draws the same lines for the page.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from matt_fast.support.plots import figure_class, save
from matt_fast.training.options import OBJECTIVES

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 500  # points of a curve: more than pixels across
WINDOW = 25  # of them that a smoothed curve averages over
DECADE = 10  # the ratio of a curve's values from which on the scale is logarithmic

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn.

    Attributes:
        name: for the legend, plain text.
        curve: (steps, values), both [points].
        noisy: draw the values pale, and a running mean over them; on a logarithmic scale where they span a decade.
        level: a value to compare with, drawn as a dashed line; None for none.
    """

    name: str
    curve: Curve
    noisy: bool = False
    level: float | None = None


def draw_curves(metrics: Path, picture: Path, on_message: Callable[[str], None] = lambda text: None) -> None:
    """Draw losses, learning rate and the bits per byte of validations over the steps of a run, as PNG.

    Where matplotlib is missing, there is nothing to draw or the picture cannot be written, there is no picture;
    `on_message` is told why.

    Args:
        metrics: metrics.jsonl, see `Metrics`.
        picture: file to write.
    """
    try:
        save(curves_figure(read_curves(metrics)), picture)
    except (ImportError, OSError, ValueError) as error:
        on_message(f"no {picture.name}: {error}")


def read_curves(metrics: Path, names: Iterable[str] = ("loss", *OBJECTIVES, "lr", "bits_per_byte")) -> dict[str, Curve]:
    """(steps, values) of these names, where there are any, from metrics.jsonl; both [lines] float64.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line but the last is no JSON object with a step and numbers.
    """
    found = defaultdict(lambda: (array("d"), array("d")))
    with open(metrics, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break  # being written
            try:
                values = dict(json.loads(line))
                for name in names:
                    if values.get(name) is not None:
                        steps, column = found[name]
                        steps.append(values["step"])
                        column.append(values[name])
            except (KeyError, TypeError, ValueError) as error:
                wanted = "a JSON object with a step and numbers"
                raise ValueError(f"{metrics}, line {number}: wanted {wanted}, got {line[:40]!r}") from error
    return {name: tuple(np.frombuffer(column) for column in found[name]) for name in names if name in found}


def curves_figure(curves: dict[str, Curve]) -> "Figure":
    """A figure of the curves that `read_curves` gives, a panel each for losses, learning rate and bits per byte.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is not one step.
    """
    figure_of = figure_class()
    if "loss" not in curves:
        raise ValueError("no step was written down")
    panels = {"training loss": loss_lines(curves), "learning rate": [Line("", curves["lr"])]}
    if "bits_per_byte" in curves:
        panels["held-out text, bits per byte"] = [Line("", curves["bits_per_byte"])]
    figure = figure_of(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True)
    for axis, (what, lines) in zip(axes, panels.items(), strict=True):
        for number, line in enumerate(lines):
            _draw(axis, line, f"C{number}")
        axis.set(xlabel="step", ylabel=what)
        axis.locator_params(axis="x", nbins=5, integer=True)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.3, which="both")
        if lines[0].noisy:
            axis.legend(fontsize="small")
            values = np.concatenate([line.curve[1] for line in lines])
            if spans_decades(values.min(), values.max()):
                axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", scilimits=(-2, 4))
    return figure


def loss_lines(curves: Mapping[str, Curve]) -> list[Line]:
    """The loss; where it is a sum, it and its parts."""
    parts = [name for name in OBJECTIVES if name in curves]
    summed = {} if len(parts) == 1 or "loss" not in curves else {"sum, scaled to the first": curves["loss"]}
    return [Line(name, curve, noisy=True) for name, curve in (summed | {x: curves[x] for x in parts}).items()]


def spans_decades(low: float, high: float) -> bool:
    """Whether noisy values from `low` to `high` want a logarithmic scale."""
    return low > 0 and high > DECADE * low


def _draw(axis: "Axes", line: Line, colour: str) -> None:
    """The values of each bin; of a noisy line their range and they are pale, and a running mean is over them."""
    steps, mean, low, high = in_bins(line.curve)
    if not line.noisy:
        axis.plot(steps, mean, color=colour, label=line.name, marker="o" if len(mean) <= WINDOW else None)
        return
    pale = {"color": colour, "alpha": 0.3, "linewidth": 0.8}
    axis.plot(steps, mean, **pale)
    if len(mean) < len(line.curve[1]):
        axis.fill_between(steps, low, high, **pale | {"linewidth": 0, "alpha": 0.2})
    axis.plot(steps, smoothed(mean), color=colour, label=line.name)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running mean over a tenth of the values, at most WINDOW of them, and over fewer at the ends."""
    ones = np.ones(min(WINDOW, max(1, len(values) // 10)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def in_bins(curve: Curve, bins: int = BINS) -> list[NDArray[np.float64]]:
    """Steps, and the mean, lowest and highest value, of at most `bins` neighbouring parts of a curve."""
    steps, values = curve
    starts = np.unique(np.linspace(0, len(values), bins, endpoint=False).astype(int))
    sizes = np.diff(starts, append=len(values))
    means = [np.add.reduceat(x, starts) / sizes for x in (steps, values)]
    return [*means, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)]
