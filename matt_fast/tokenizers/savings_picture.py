"""Bytes per token over the number of added tokens, as a picture."""

from typing import TYPE_CHECKING

import numpy as np

from matt_fast.support.plots import BLUE, COLOURS, GREY, VERMILION, figure_class, fonts_for
from matt_fast.tokenizers.report import Report

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

POINTS = 400  # of a curve
LINES = (BLUE, VERMILION, COLOURS[2], COLOURS[4], COLOURS[1], COLOURS[0], "#000000")
STYLES = ("-", "--", ":", "-.")
ENOUGH = 0.95


def savings_figure(found: Report) -> "Figure":
    """A panel for each tokenizer that goes on with the merges of the first, a curve for each text.

    A dot on a curve is where 95% of what all added tokens save is reached; its label has the number of tokens there.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no such tokenizer; it says why.
    """
    figure_of = figure_class()
    if not found.curves:
        why = "; ".join(f"{x.name}: {x.no_curve}" for x in found.tokenizers[1:]) or "only one tokenizer"
        raise ValueError(
            f"output: wanted a tokenizer that adds tokens to the first one to draw a curve, got none ({why})"
        )
    base = found.tokenizers[0]
    families, _ = fonts_for([*found.curves, *base.texts, base.name])
    count = len(found.curves)
    figure = figure_of(figsize=(5.6 * count + 0.4, 4), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis, (name, texts) in zip(axes, found.curves.items(), strict=True):
        for number, (text, savings) in enumerate(texts.items()):
            colour, style = LINES[number % len(LINES)], STYLES[number % len(STYLES)]
            steps = np.unique(np.linspace(0, len(savings.tokens) - 1, POINTS).astype(int))
            values, enough = savings.bytes_per_token, savings.added_for(ENOUGH)
            axis.plot(steps, values[steps], style, color=colour, label=f"{text} ({enough:,})")
            axis.plot(enough, values[enough], "o", color=colour)
            axis.plot(0, base.texts[text].bytes_per_token, "_", color=GREY, markersize=12, clip_on=False)
        axis.set_title(name, family=families, parse_math=False, fontsize=11)
        axis.set_xlabel("added tokens, in the order of their merges")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.margins(y=0.15)
        axis.grid(alpha=0.3)
        for text in axis.legend(prop={"family": families, "size": 9}).get_texts():
            text.set_parse_math(False)
    axes[0].set_ylabel("bytes per token")
    figure.supxlabel(f"dot, and number in brackets: {ENOUGH:.0%} of what all save", fontsize=9, color=GREY)
    return figure
