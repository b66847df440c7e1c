# ruff: noqa: RUF001 - look-alike characters are what is shown
"""Attention influence between segments as a picture (paper, Figures 1 and 5)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from matt_fast.show.influence import Influence
from matt_fast.support.plots import figure_class, fonts_for

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, PER_LABEL, LARGEST = 3.4, 0.16, 7.5  # inches
MAX_LABELS = 40  # along an axis
MAX_WIDTH = 16  # characters of a label


def influence_figure(found: Influence, names: Sequence[str] = ("original tokenizer", "new tokenizer")) -> "Figure":
    """A panel for the teacher and one for each student, on one scale, and below how far students are from the teacher.

    Rows are segments that read, columns those that are read. Labels that no font can draw, or that would stand too
    close, are numbers of segments.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_of = figure_class()
    families, missing = fonts_for(found.labels)
    count, students = len(found.labels), list(found.students)
    side = float(np.clip(PER_LABEL * count + 1.2, PANEL, LARGEST))
    figure = figure_of(figsize=(side * (1 + len(students)) + 0.8, 2 * side + 0.4), layout="constrained")
    axes = figure.subplots(2, 1 + len(students), squeeze=False)
    panels = [(f"teacher, {names[0]}", found.teacher), *((f"student {x}", found.students[x]) for x in students)]
    labels = None if missing else found.labels
    strength = _draw_row(axes[0], panels, found, labels, families, "cividis")
    axes[1, 0].axis("off")
    panels = [(f"{x}, distance: mean {found.mean_distance(x):.3g}", found.distances[x]) for x in students]
    distance = _draw_row(axes[1, 1:], panels, found, labels, families, "inferno")
    figure.colorbar(strength, ax=axes[0], label="|s[i, j]|", fraction=0.05, aspect=25)
    figure.colorbar(distance, ax=axes[1], label="|s′[i, j] − s[i, j]|", fraction=0.05, aspect=25)
    note = axes[1, 0].text(0, 0.95, _note(found, names, missing), va="top", fontsize=10, parse_math=False)
    note.set_in_layout(False)
    return figure


def _note(found: Influence, names: Sequence[str], missing: set[str]) -> str:
    lines = [
        f"layer {found.layer}, " + ("mean over heads" if found.head is None else f"head {found.head}"),
        f"{len(found.labels)} segments" + (f"; {found.left_out:,} more do not fit" if found.left_out else ""),
        f"student: {names[1]}",
        "",
        "row i: the segment that reads",
        "column j: the segment that is read",
        "lower row: student minus teacher",
    ]
    if missing:
        lines += ["", f"labels are numbers: no font here has {len(missing)}", "of the text's characters"]
    return "\n".join(lines)


def _draw_row(axes: "Sequence[Axes]", panels, found: Influence, labels, families, colours: str):
    """Matrices side by side on one scale; returns what a colour bar needs."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    most = max(float(values.max()) for _, values in panels)
    palette = colormaps[colours].with_extremes(bad="#ffffff")
    for axis, (title, values) in zip(axes, panels, strict=True):
        shown = values.numpy().astype(float)
        if found.causal:
            shown = np.where(np.tri(len(shown), dtype=bool), shown, np.nan)
        image = axis.imshow(shown, cmap=palette, norm=Normalize(0, most or 1), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        _label(axis, len(shown), labels, families)
    return image


def _label(axis: "Axes", count: int, labels, families) -> None:
    step = -(-count // MAX_LABELS)
    places = range(0, count, step)
    texts = [str(i + 1) if labels is None else _short(labels[i]) for i in places]
    style = {"fontsize": 7, "family": families if labels is not None else None, "parse_math": False}
    axis.set_xticks(places, texts, rotation=90, **style)
    axis.set_yticks(places, texts, **style)
    axis.tick_params(length=1.5, pad=1.5)


def _short(label: str) -> str:
    return label if len(label) <= MAX_WIDTH else label[: MAX_WIDTH - 1] + "…"
