"""What a run did, in sentences, and its options in a table."""

import math
import shlex
from collections import Counter
from html import escape

from matt_fast.report.words import cell, duration, last_part, named, table
from matt_fast.runs.record import STATES, Record
from matt_fast.support.units import GIB

STARTS = {
    "mean": "the mean of the old tokens that spell it",
    "length-mean": "the mean of the old tokens that spell it, each counted by its length",
    "first-piece": "the first of the old tokens that spell it",
    "last-piece": "the last of the old tokens that spell it",
    "random": "random numbers with the spread of the old rows",
    "zero": "zeros",
}
LAYERS = {
    "lora": "adapters of rank {heal_rank} beside the layers, merged at the end",
    "outer": "the first and last {heal_outer_layers} layers",
    "full": "all layers",
}


def status_line(record: Record) -> str:
    """HTML that says whether the run is whole, and how to go on where it is not."""
    if record.finished:
        return ""
    phases = [x for x in record.phases if x.metrics.is_file()]
    if record.at_work is not None:
        where = progress_line(record) or "before training"
        return (
            f'<p class="notice"><strong>This run is at work</strong> ({escape(record.at_work)}): {escape(where)}. '
            "What it made so far is shown.</p>"
        )
    at = (
        f" at step {record.step:,} of {record.steps or phases[-1].steps:,}"
        if phases and record.step is not None
        else ""
    )
    what = phases[-1].title.lower() if phases else "before training"
    go_on = f"matt-fast transfer --resume {shlex.quote(str(record.folder))}"
    return (
        f'<p class="notice"><strong>This run is {STATES[record.status]}</strong> ({what}{at}, by its last checkpoint). '
        f"What it left so far is shown. To go on: {named(go_on)}</p>"
    )


def progress_line(record: Record) -> str:
    """How far the present training is by its last line of metrics, and how long the rest takes at that speed."""
    phases, line = [x for x in record.phases if x.metrics.is_file()], record.last_line
    if not phases or not line:
        return ""
    step, steps = line["step"], record.steps or phases[-1].steps
    loss = math.nan if line["loss"] is None else line["loss"]
    left = duration(line["seconds"] / max(1, step) * (steps - step))
    return f"{phases[-1].title.lower()}, step {step:,} of {steps:,}, loss {loss:.4g}; {left} left at its speed so far"


def what_was_done(record: Record) -> list[str]:
    """Sentences, each HTML."""
    options, result = record.options, record.result
    model, tokenizer = (named(last_part(options[x])) for x in ("model", "tokenizer"))
    got = f"{'got' if record.finished else 'gets'} the tokenizer {tokenizer}"
    lines = [f"{model} {'keeps its tokenizer, and trains on' if record.trained_on else got}."]
    if result:
        share = f"{result['shared']:,} of its tokens are the original's, {result['new']:,} are new."
        seen = f"Training saw {result['seen']:,} of the {result['trainable']:,} rows that it could change."
        lines[0] += f" {share} {seen}"
    start = STARTS.get(str(options["init"]), f"what {named(last_part(options['init']))} makes")
    start = "the model has it already" if record.trained_on else start
    lines.append(f"A new token's row starts as {start}.{_head(options['init_head'])}")
    lines += [_training(record, phase) for phase in record.phases] or ["Nothing was trained."]
    if result and result.get("rehearsal"):
        texts = result["rehearsal"]["texts"]
        lines.append(f"One chunk in five is of {texts:,} texts that the teacher wrote of its own.")
    if record.options["freeze_shared"]:
        lines.append("Rows of shared tokens stay as they are.")
    else:
        lines.append("Rows of shared tokens are trained too.")
    if result:
        in_all = duration(sum(record.seconds.values()))
        several = f" on {record.processes} processes" if record.processes > 1 else ""
        lines.append(f"It took {in_all}{several} and {result['peak_memory'] / GIB:.2f} GiB at most.")
    return lines


def _head(init_head: str) -> str:
    if init_head == "same":
        return ""
    if init_head == "boundary":
        return " Output rows start from what the original expects."
    return f" Its output row starts as {STARTS.get(init_head, f'what {init_head} makes')}."


def _training(record: Record, phase) -> str:
    options, progress = record.options, phase.progress
    data = named(last_part(options["data"]))
    if phase.name == "rows":
        what, rate = "Rows are trained alone", f"learning rate {options['lr']:g}"
    else:
        layers = LAYERS.get(str(options["heal"]), "layers").format(**options)
        first = "Rows are then trained" if len(record.phases) > 1 else "Rows are trained"
        what = f"{first} together with {layers}"
        rate = f"learning rates {options['heal_lr']:g} (layers) and {options['heal_rows_lr']:g} (rows)"
    steps = f"{len(progress['losses']):,} steps" if progress else f"{phase.steps:,} steps planned"
    lines = [f"{what}: {steps} of {named(phase.objective)} on {data}, {rate}"]
    if progress:
        lines[0] += f"; {progress['tokens']:,} tokens in {duration(progress['seconds'])}"
    if phase.validation:
        at = "its start" if phase.best_step == 0 else f"step {phase.best_step}"
        best = "none was kept" if phase.best_step is None else f"the best was at {at}; its weights are the result"
        lines.append(f" Of {len(phase.validation)} validations {best}")
    return ".".join(lines) + "."


def options_table(record: Record) -> str:
    """Every option and its value."""
    rows = [
        cell(escape(name.replace("_", "-")), head=True) + cell(shown(value)) for name, value in record.options.items()
    ]
    return table(["option", "value"], rows, "options of the run", "options")


def shown(value: object) -> str:
    """HTML of an option's value."""
    if value is None or value == []:
        return '<span class="none">none</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "<br>".join(escape(str(x)) for x in value)
    return escape(f"{value:g}" if isinstance(value, float) else str(value))


def messages(record: Record) -> str:
    """HTML of what the run told, and of initialised rows that stand out."""
    lines = [escape(x) for x in record.messages]
    outliers = record.result.get("report", {}).get("outliers", [])
    if outliers:
        worst = ", ".join(named(x["token"]) for x in outliers[:5])
        lines.append(f"{len(outliers):,} initialised rows stand out, badly fitted or poisoned; the worst: {worst}")
    skipped: Counter[str] = Counter()
    for x in record.phases:
        skipped |= Counter(x.progress.get("skipped", {}))  # both read the same data
    if skipped:
        lines.append("Training passed over " + ", ".join(f"{n:,} {escape(what)}" for what, n in skipped.items()))
    without = sum(x.progress.get("steps_without_new_tokens", 0) for x in record.phases)
    if without:
        lines.append(f"{without:,} steps had no new token and trained nothing")
    if not lines:
        return "<p>None.</p>"
    return "<ul>" + "".join(f"<li>{x}</li>" for x in lines) + "</ul>"
