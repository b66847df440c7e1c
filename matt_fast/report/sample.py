"""A sample text under both tokenizers: its segments, and what attention moves between them."""

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from matt_fast.report.charts import as_json
from matt_fast.report.words import named
from matt_fast.show.pieces import Segments
from matt_fast.show.segments_page import segment_blocks

if TYPE_CHECKING:  # it imports torch
    from matt_fast.show.influence import Influence

MOST = 600  # characters of a sample
SHADES = 10  # of a map, of page.css
WIDTH, MARGIN, LINE = 400, 104, 12  # of a map, its labels, a line of them
LONGEST = 14  # characters of a label
TITLES = {"before": "new tokenizer, before training", "after": "new tokenizer, after training"}
LARGEST = 5  # differences that are named


def segments_section(found: Segments, old: str, new: str) -> str:
    """The segments of the sample: old tokens above, new ones below."""
    tokens = [sum(len(getattr(x, side)) for x in found.segments) for side in ("old", "new")]
    direction = "rtl" if found.right_to_left else "ltr"
    return (
        f"<p>{len(found.segments):,} segments. In each, above: <b>{tokens[0]:,} tokens</b> of {named(old)}, below: "
        f"<b>{tokens[1]:,}</b> of {named(new)}. ␣ is a space, ⏎ the end of a line.</p>\n"
        f'<div class="text" dir="{direction}">{segment_blocks(found)}</div>\n'
    )


def influence_section(found: "Influence", note: str = "") -> str:
    """Maps of how strongly each segment of the sample draws on those before it."""
    maps = {"original tokenizer": found.teacher} | {TITLES.get(name, name): x for name, x in found.students.items()}
    arrays = {name: x.numpy().astype(float) for name, x in maps.items()}
    most = max(float(x.max()) for x in arrays.values()) or 1.0
    head = "mean over heads" if found.head is None else f"head {found.head}"
    means = ", ".join(f"{found.mean_distance(name):.3g} {name} training" for name in found.distances)
    left = f" {found.left_out:,} more segments do not fit." if found.left_out else ""
    figures = "".join(_map(name, values, found, most) for name, values in arrays.items())
    return (
        f"<p>How strongly a segment (row) draws on each segment that it reads (column) at layer {found.layer}, {head}: "
        f"the length of s[i, j], its square root as the shade. Mean distance from the original: {means}."
        f"{left} {escape(note)}</p>\n"
        f'<div class="charts">{figures}</div>\n{_largest(found)}'
    )


def _map(title: str, values: np.ndarray, found: "Influence", most: float) -> str:
    count = len(values)
    cell = (WIDTH - MARGIN) / count
    seen = np.tri(count, dtype=bool) if found.causal else np.ones((count, count), dtype=bool)
    shades = np.minimum((np.sqrt(values / most) * SHADES).astype(int), SHADES - 1)  # few are far above the others
    paths = []
    for shade in range(SHADES):
        places = np.argwhere(seen & (shades == shade))
        cells = "".join(f"M{j} {i}h1v1h-1z" for i, j in places)
        if cells:
            paths.append(f'<path class="h{shade}" d="{cells}"/>')
    step = math.ceil(LINE / cell)
    below = max(cell / 2 + 4, LINE - 3)
    labels = "".join(
        f'<text x="{MARGIN - 5}" y="{cell * i + below:.1f}" text-anchor="end">{escape(_short(found.labels[i]))}</text>'
        for i in range(0, count, step)
    )
    data = {
        "labels": found.labels,
        "margin": MARGIN,
        "cell": cell,
        "values": [[float(f"{x:.3g}") for x in row[: i + 1 if found.causal else None]] for i, row in enumerate(values)],
    }
    return (
        f'<figure class="map"><figcaption><h4>{escape(title)}</h4></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {WIDTH - MARGIN}" role="img" tabindex="0" aria-label="{escape(title)}, '
        f'{count} segments; arrow keys tell the values">{labels}<g transform="translate({MARGIN} 0) scale({cell:.5f})">'
        f'{"".join(paths)}<rect class="cursor" width="1" height="1" visibility="hidden"/></g></svg>'
        f'<output class="readout">at most {values.max():.3g}</output>'
        f'<script type="application/json">{as_json(data)}</script></figure>\n'
    )


def _largest(found: "Influence") -> str:
    """Where the student is furthest from the original, in words."""
    name, distances = list(found.distances.items())[-1]
    values = distances.numpy()
    lines = []
    for place in np.argsort(values, axis=None)[::-1][:LARGEST]:
        i, j = divmod(int(place), len(values))
        lines.append(f"<li>{values[i, j]:.3g}: {named(found.labels[i])} draws on {named(found.labels[j])}</li>")
    return f"<details><summary>The largest distances {name} training</summary><ol>{''.join(lines)}</ol></details>\n"


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"
