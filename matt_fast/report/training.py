"""The curves of a run's training, as charts."""

from collections.abc import Mapping

from matt_fast.report.charts import chart
from matt_fast.report.curves import Curve, Line, loss_lines, read_curves
from matt_fast.runs.record import HELD_OUT, Phase, Record, held_out_names
from matt_fast.training.options import OBJECTIVES

VALIDATION = "bits_per_byte"


def curves_of(record: Record, phase: Phase) -> dict[str, Curve]:
    """The curves of a part of the training: "loss", those of objectives, "lr", and of validations by their text.

    Raises:
        ValueError: the file of metrics is damaged.
    """
    if not phase.metrics.is_file():
        return {}
    first, *others = held_out_names(record.options) or [HELD_OUT]
    names = {VALIDATION: first} | {f"{VALIDATION}/{x}": x for x in others}
    found = read_curves(phase.metrics, ("loss", *OBJECTIVES, "lr", *names))
    return {f"{VALIDATION}/{names[name]}" if name in names else name: curve for name, curve in found.items()}


def training_charts(record: Record) -> str:
    """HTML of the charts of a run, or of what there is instead of them."""
    parts = []
    for phase in record.phases:
        curves = curves_of(record, phase)
        parts += [
            chart(f"{phase.title}: loss", loss_lines(curves), f"loss ({phase.objective})"),
            chart(f"{phase.title}: validation", validation_lines(record, curves), "bits per byte",
                  "Dotted: the original model."),
            chart(f"{phase.title}: learning rate", [Line("", curves["lr"])] if "lr" in curves else [], "learning rate"),
        ]  # fmt: skip
    shown = "".join(parts)
    return f'<div class="charts">{shown}</div>' if shown else "<p>There was no step.</p>"


def validation_lines(record: Record, curves: Mapping[str, Curve]) -> list[Line]:
    """Bits per byte of each text, beside the original model's."""
    found = []
    for name, curve in curves.items():
        if name.startswith(f"{VALIDATION}/"):
            text = name.removeprefix(f"{VALIDATION}/")
            level = record.evaluations.get(text, {}).get("original", {}).get(VALIDATION)
            found.append(Line(text, curve, level=level))
    return found
