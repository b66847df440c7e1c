"""Several runs beside each other: what differs, what came out, and their curves on one scale."""

from collections.abc import Mapping, Sequence
from html import escape

from matt_fast.report.charts import chart
from matt_fast.report.curves import Curve, Line
from matt_fast.report.figures import TIMES, ratio, verdict
from matt_fast.report.sentences import shown
from matt_fast.report.training import VALIDATION, curves_of
from matt_fast.report.words import DIGITS, NOTHING, cell, duration, table
from matt_fast.runs.record import STATES, Record
from matt_fast.support.printable import short_names
from matt_fast.support.units import GIB

ELSEWHERE = ("output",)  # options that always differ


def names_of(records: Sequence[Record]) -> list[str]:
    """A name for each run: as many last parts of its folder as tell it from the others, else a number too."""
    names = short_names([str(x.folder.absolute()) for x in records])
    return names if len(set(names)) == len(names) else [f"{x} ({i})" for i, x in enumerate(names, 1)]


def comparison_section(records: Sequence[Record], names: Sequence[str]) -> str:
    """HTML of the comparison of several runs."""
    return (
        f"<h3>What came out</h3>\n{_outcomes(records, names)}<h3>What differs</h3>\n{_differences(records, names)}"
        f"<h3>Curves</h3>\n{_curves(records, names)}"
    )


def _outcomes(records: Sequence[Record], names: Sequence[str]) -> str:
    rows = [_row("state", [STATES[x.status].partition(",")[0] for x in records])]
    for text in dict.fromkeys(text for x in records for text in x.evaluations):
        found = [x.evaluations.get(text, {}) for x in records]
        bits = [x["trained"]["bits_per_byte"] if "trained" in x else None for x in found]
        best = min((round(x, DIGITS) for x in bits if x is not None), default=None)
        cells = []
        for value, stages in zip(bits, found, strict=True):
            if value is None:
                cells.append(cell(NOTHING, "number"))
                continue
            original = stages.get("original")
            kind = "" if original is None else verdict(value, original["bits_per_byte"])
            figure = f"{value:.{DIGITS}f}"
            figure = f"<b>{figure}</b>" if round(value, DIGITS) == best else figure
            times = "" if original is None else f" <small>({ratio(stages['trained'], original):.3f}{TIMES})</small>"
            cells.append(cell(figure + times, f"number {kind}".strip()))
        rows.append(cell(f"{escape(text)}: bits per byte", head=True) + "".join(cells))
        tokens = [x.get("trained") or x.get("initialised") for x in found]
        sizes = [NOTHING if x is None else f"{x['bytes_per_token']:.3f}" for x in tokens]
        rows.append(_row(f"{text}: bytes per token", sizes))
    results = [x.result for x in records]
    rows.append(_row("new tokens", [f"{x['new']:,}" if x else NOTHING for x in results]))
    rows.append(
        _row("rows seen in training", [f"{x['seen']:,} of {x['trainable']:,}" if x else NOTHING for x in results])
    )
    rows.append(_row("time", [duration(sum(x.seconds.values())) for x in records]))
    rows.append(_row("memory, GiB", [f"{x['peak_memory'] / GIB:.2f}" if x else NOTHING for x in results]))
    return _table("", rows, names, "what came out") + (
        "<p>The lowest bits per byte are bold; in brackets, against the original model of the run.</p>\n"
    )


def _differences(records: Sequence[Record], names: Sequence[str]) -> str:
    options = [x.options for x in records]
    keys = [x for x in dict.fromkeys(key for each in options for key in each) if x not in ELSEWHERE]
    missing = object()
    rows = []
    for key in keys:
        values = [x.get(key, missing) for x in options]
        if any(x != values[0] for x in values):
            cells = "".join(cell(NOTHING if x is missing else shown(x)) for x in values)
            rows.append(cell(escape(key.replace("_", "-")), head=True) + cells)
    return _table("option", rows, names, "options that differ") if rows else "<p>No option.</p>\n"


def _curves(records: Sequence[Record], names: Sequence[str]) -> str:
    """Losses of one objective on one chart, as those of others do not compare, and validations by text; of several."""
    losses: dict[str, list[Line]] = {}
    validations: dict[str, list[Line]] = {}
    for record, name in zip(records, names, strict=True):
        for phase in record.phases:
            curves: Mapping[str, Curve] = curves_of(record, phase)
            if "loss" in curves:
                losses.setdefault(f"{phase.title}: loss ({phase.objective})", []).append(
                    Line(name, curves["loss"], noisy=True)
                )
            for key, curve in curves.items():
                if key.startswith(VALIDATION):
                    text = key.partition("/")[2]
                    validations.setdefault(f"{phase.title}: validation on {text}", []).append(Line(name, curve))
    parts = [chart(title, lines, "loss") for title, lines in losses.items() if len(lines) > 1]
    parts += [chart(title, lines, "bits per byte") for title, lines in validations.items() if len(lines) > 1]
    if not parts:
        return "<p>No two runs have curves of the same objective or text.</p>\n"
    return f'<div class="charts">{"".join(parts)}</div>\n'


def _row(head: str, values: Sequence[str]) -> str:
    return cell(escape(head), head=True) + "".join(cell(escape(x), "number") for x in values)


def _table(corner: str, rows: list[str], names: Sequence[str], label: str) -> str:
    return table([corner, *(f'<a href="#run-{i}">{escape(x)}</a>' for i, x in enumerate(names, 1))], rows, label)
