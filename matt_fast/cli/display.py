"""What a person sees after a command: tables and lines. See progress.py for what is seen meanwhile."""

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from matt_fast.cli.output import say
from matt_fast.cli.tables import print_table
from matt_fast.support.printable import printable
from matt_fast.support.units import GIB, MIB

if TYPE_CHECKING:  # these import torch
    from matt_fast.initializers import InitReport
    from matt_fast.planning.plan import Plan
    from matt_fast.recipe.comparison import Initialised
    from matt_fast.recipe.doctor import Finding
    from matt_fast.recipe.result import Healing, TransferResult
    from matt_fast.recipe.sweep import Sweep
    from matt_fast.training.state import Progress

OUTLIERS = 5  # printed at most


def print_result(console: Console, result: "TransferResult") -> None:
    """The figures of a transfer: one table, and below it what was done."""
    from matt_fast.recipe.card import evaluation_rows, skipped_lines, training_line, validation_line

    table = Table(title="Tokenizer transfer", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte (95%)", justify="right", no_wrap=True)
    table.add_column("bytes per token", justify="right")
    for row in evaluation_rows(result):
        table.add_row(*(Text(printable(cell)) for cell in row))
    if table.row_count:
        print_table(console, table)
    progress, in_all = result.progress, sum(result.seconds.values())
    lines = [
        f"tokens    {result.shared:,} shared, {result.new:,} new; trained {result.seen:,} of {result.trainable:,} rows",
        *(f"start     {line}" for line in report_lines(result.report)),
        *([f"snippets  {result.snippets.message()}"] if result.snippets is not None else []),
        *([f"rehearsal {result.rehearsal.message()}"] if result.rehearsal is not None else []),
        *([f"training  {training_line(progress)}"] if progress.step or result.healing is None else []),
        *([f"          {line}"] if (line := validation_line(result)) else []),
        *([] if result.healing is None else _healing_lines(result.healing)),
        *_data_lines(progress if result.healing is None else result.healing.progress),
        f"all       {in_all:.0f} s",
        f"memory    {result.peak_memory / GIB:.2f} GiB at most, {result.training_memory / GIB:.2f} in training",
        *(f"skipped   {line}" for line in skipped_lines(result)),
    ]
    say(console, "\n".join(lines))


def _data_lines(progress: "Progress") -> list[str]:
    if not progress.step:
        return []
    padding, waiting = f"{progress.padding:.1%}", f"{progress.waiting:.1%}"
    return [f"data      {padding} of the rows is padding, {waiting} of the time waiting for it"]


def _healing_lines(healing: "Healing") -> list[str]:
    from matt_fast.recipe.card import validation_line

    progress = healing.progress
    return [
        f"healing   {healing.method}: {len(progress.losses)} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} "
        f"s, {healing.trained_numbers:,} numbers beside the rows",
        *([f"          {line}"] if (line := validation_line(healing)) else []),
    ]


def report_lines(report: "InitReport") -> list[str]:
    """How many rows came from where, and the worst outliers."""
    own = f"{report.own:,} train on from the model's own rows, " if report.own else ""
    unseen = "" if report.unseen is None else f" ({report.unseen:,} of them never occur in the text)"
    lines = [
        f"{report.shared:,} shared, {own}{report.initialized:,} initialised by the method, {report.subtoken_mean:,} "
        f"left to their sub-tokens{unseen}, {report.unspelled:,} without a spelling"
    ]
    if report.outliers:
        lines.append(f"{len(report.outliers):,} outliers, badly fitted or poisoned; the worst:")
    for outlier in report.outliers[:OUTLIERS]:
        lines.append(
            f"  {outlier.token!r}: coefficients' sum {outlier.coefficient_sum:.3g}, their norm "
            f"{outlier.coefficient_norm:.3g}, the row's {outlier.row_norm:.3g}"
            + (f", the output row's {outlier.output_row_norm:.3g}" if outlier.output_row_norm is not None else "")
            + " times the median"
        )
    return lines


INITIALISED = "{:<24} {:>13} {:>8} {:>11} {:>12}"


def print_initialised_head(console: Console, original: float) -> None:
    """What the columns of `print_initialised` are, and the original model's figure."""
    say(console, INITIALISED.format("initialiser", "bits per byte", "seconds", "memory, GiB", "after probe"), "bold")
    say(console, INITIALISED.format("original model", f"{original:.4f}", "", "", "").rstrip())


def print_initialised(console: Console, result: "Initialised") -> None:
    """One line of figures, at once, and below it what the rows are made of."""
    figures = f"{result.bits_per_byte:.4f}", f"{result.seconds:.1f}", f"{result.memory / GIB:.2f}"
    probed = "" if result.probed is None else f"{result.probed:.4f}"
    say(console, INITIALISED.format(result.init, *figures, probed).rstrip())
    first, *rest = report_lines(result.report)
    for line in (f"{result.init}: {first}", *rest):
        say(console, f"  {line}", "dim")


def print_sweep(console: Console, outcome: "Sweep") -> None:
    """One line for each depth."""
    table = Table(title="Depth of the target layer", title_justify="left")
    for name in ("layer", "bits per byte", "training, s", "memory, GiB"):
        table.add_column(name, justify="right")
    for depth in outcome.depths:
        figures = f"{depth.bits_per_byte:.4f}", f"{depth.seconds:.0f}", f"{depth.memory / GIB:.2f}"
        table.add_row(str(depth.n_layers), *figures)
    print_table(console, table)
    original, initialised = f"{outcome.original:.4f}", f"{outcome.initialised:.4f}"
    say(console, f"bits per byte of the original model {original}, before training {initialised}")


STYLES = {"ok": "green", "look at this": "yellow", "will fail": "bold red"}


def print_findings(console: Console, findings: list["Finding"]) -> None:
    """One line for each check, and how many of each kind there are."""
    for area in dict.fromkeys(x.area for x in findings):
        say(console, area, "bold")
        table = Table.grid(padding=(0, 2))
        for width in (12, 14, None):
            table.add_column(width=width, no_wrap=width is not None)
        for x in (x for x in findings if x.area == area):
            text = Text(printable(x.found))
            if x.advice:
                text.append(f" → {printable(x.advice)}", STYLES[x.verdict])
            table.add_row(Text(x.verdict, STYLES[x.verdict]), Text(x.name, "dim"), text)
        console.print(table)
    counts = Counter(x.verdict for x in findings)
    say(console, ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict]), "bold")


def print_plan(console: Console, found: "Plan", teraflops: float | None = None) -> None:
    """Memory by part, work, and what fits; with `teraflops` a time that follows from it."""
    alone = found.step is None  # healing, which then has what else is the rows' place
    step = found.healing if alone else found.step
    table = Table(title="Predicted peak" + " of healing" * alone, title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in step.parts.items():
        if size >= step.peak / 100:
            table.add_row(Text(printable(name)), f"{size / GIB:.2f}")
    table.add_row("all tensors", f"{step.peak / GIB:.2f}", style="bold")
    console.print(table)
    lines = [
        f"target layer   {found.n_layers}",
        f"rows           {found.trainable:,} of {found.rows:,} are trained",
        f"work           {step.flops / 1e12:,.2f} teraflop a step" + " of rows and layers together" * alone,
    ]
    beside = found.healing is not None and not alone
    if beside:
        peak, flops = found.healing.peak / GIB, found.healing.flops / 1e12
        lines.append(f"healing        {peak:.2f} GiB at most, {flops:,.2f} teraflop a step of rows and layers together")
    if teraflops is not None:
        line = f"modelled time  {step.flops / 1e12 / teraflops:,.3f} s a step at {teraflops:g} teraflop/s"
        if beside:
            line += f", {found.healing.flops / 1e12 / teraflops:,.3f} s of healing"
        lines.append(line)
    if found.longest is not None:
        lines.append(f"longest        {found.longest:,} tokens at this batch size")
        lines.append(f"largest batch  {found.largest_batch:,} at this length")
    for remedy in found.remedies:
        verdict = "fits" if remedy.fits else "does not fit"
        lines.append(f"{verdict + ':':14} {remedy.options} ({remedy.peak / GIB:.2f} GiB)")
    say(console, "\n".join(lines))


LAYOUTS = {"whole": "whole copies", "sharded": "--shard"}


def print_layouts(console: Console, found: "Plan", processes: int, vram: int | None = None) -> None:
    """What each layout takes of each process, and which one to choose; nothing of a single process."""
    if not found.layouts:
        return
    table = Table(title=f"Each of {processes:,} processes", title_justify="left")
    for name in ("", "peak, GiB", "rows, MiB sent", "layers, MiB sent", "s to send"):
        table.add_column(name, justify="right" if name else "left")
    for x in found.layouts:
        sent = (f"{size / MIB:,.1f}" for size in (x.rows, x.layers))
        table.add_row(Text(LAYOUTS[x.name]), f"{x.step.peak / GIB:.2f}", *sent, f"{x.seconds:,.3f}")
    print_table(console, table)
    if vram is not None:
        best = found.layout(vram)
        say(console, "proposed       " + ("none: no layout fits" if best is None else LAYOUTS[best.name]))
