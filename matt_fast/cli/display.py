"""What a person sees during and after a transfer: the stages, a progress bar, one table."""

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from matt_fast.initializers import InitReport
from matt_fast.planning.plan import Plan
from matt_fast.recipe.card import evaluation_rows, skipped_lines
from matt_fast.recipe.comparison import Initialised
from matt_fast.recipe.result import TransferResult
from matt_fast.recipe.sweep import Sweep
from matt_fast.training.loop import Progress as TrainingProgress

GIB = 1 << 30
OUTLIERS = 5  # printed at most


class ProgressDisplay:
    """A context manager whose methods are the callbacks of `transfer`.

    Args:
        console: where to print.
        steps: training steps to come.
    """

    def __init__(self, console: Console, steps: int):
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        hidden = {"figures": "", "visible": False}
        self.initialisation = self.bar.add_task("initialisation", start=False, total=None, **hidden)
        self.task = self.bar.add_task("training", total=steps, **hidden)

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def on_stage(self, stage: str) -> None:
        self.console.print(f"[bold]{stage}[/bold]")

    def on_initialise(self, done: int, total: int) -> None:
        self.bar.start_task(self.initialisation)
        self.bar.update(self.initialisation, completed=done, total=total, figures="rows", visible=True)

    def on_step(self, progress: TrainingProgress) -> None:
        rate = progress.tokens / progress.seconds
        parts = progress.parts if len(progress.parts) > 1 else {"loss": progress.loss}
        losses = " ".join(f"{name} {value:.3g}" for name, value in parts.items())
        figures = f"{losses} · {rate:,.0f} tokens/s · {_memory_in_use() / GIB:.2f} GiB"
        self.bar.update(self.task, completed=progress.step, figures=figures, visible=True)


def print_result(console: Console, result: TransferResult) -> None:
    """The figures of a transfer: one table, and below it what was done."""
    table = Table(title="Tokenizer transfer", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("bytes per token", justify="right")
    for row in evaluation_rows(result):
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    progress, in_all = result.progress, sum(result.seconds.values())
    lines = [
        f"tokens    {result.shared:,} shared, {result.new:,} new; trained {result.seen:,} of {result.trainable:,} rows",
        *(f"start     {line}" for line in report_lines(result.report)),
        f"training  {len(progress.losses)} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s",
        f"data      {progress.padding:.1%} of the rows is padding, {progress.waiting:.1%} of the time waiting for it",
        f"all       {in_all:.0f} s",
        f"memory    {result.peak_memory / GIB:.2f} GiB at most, {result.training_memory / GIB:.2f} in training",
        *(f"skipped   {line}" for line in skipped_lines(progress)),
    ]
    console.print("\n".join(lines), highlight=False, markup=False)


def report_lines(report: InitReport) -> list[str]:
    """How many rows came from where, and the worst outliers."""
    unseen = "" if report.unseen is None else f" ({report.unseen:,} of them never occur in the text)"
    lines = [
        f"{report.shared:,} shared, {report.initialized:,} initialised by the method, {report.subtoken_mean:,} left to "
        f"their sub-tokens{unseen}, {report.unspelled:,} without a spelling"
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


def print_initialisers(console: Console, original: float, results: list[Initialised]) -> None:
    """One line of figures for each initialiser, and below it what its rows are made of."""
    table = Table(title="Initialisers", title_justify="left")
    table.add_column("")
    for name in ("bits per byte", "seconds", "memory, GiB"):
        table.add_column(name, justify="right")
    table.add_row("original model", f"{original:.4f}", "", "")
    for result in results:
        figures = f"{result.bits_per_byte:.4f}", f"{result.seconds:.1f}", f"{result.memory / GIB:.2f}"
        table.add_row(escape(result.init), *figures)
    console.print(table)
    for result in results:
        first, *rest = report_lines(result.report)
        console.print("\n".join([f"{result.init}: {first}", *rest]), highlight=False, markup=False, soft_wrap=True)


def print_sweep(console: Console, outcome: Sweep) -> None:
    """One line for each depth."""
    table = Table(title="Depth of the target layer", title_justify="left")
    for name in ("layer", "bits per byte", "training, s", "memory, GiB"):
        table.add_column(name, justify="right")
    for depth in outcome.depths:
        figures = f"{depth.bits_per_byte:.4f}", f"{depth.seconds:.0f}", f"{depth.memory / GIB:.2f}"
        table.add_row(str(depth.n_layers), *figures)
    console.print(table)
    console.print(
        f"bits per byte of the original model {outcome.original:.4f}, before training {outcome.initialised:.4f}",
        highlight=False,
    )


def print_plan(console: Console, found: Plan, teraflops: float | None = None) -> None:
    """Memory by part, work, and what fits; with `teraflops` a time that follows from it."""
    table = Table(title="Predicted peak", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in found.step.parts.items():
        if size >= found.step.peak / 100:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("all tensors", f"{found.step.peak / GIB:.2f}", style="bold")
    console.print(table)
    lines = [
        f"target layer   {found.n_layers}",
        f"rows           {found.trainable:,} of {found.rows:,} are trained",
        f"work           {found.step.flops / 1e12:,.2f} teraflop a step",
    ]
    if teraflops is not None:
        lines.append(f"modelled time  {found.step.flops / 1e12 / teraflops:,.3f} s a step at {teraflops:g} teraflop/s")
    if found.longest is not None:
        lines.append(f"longest        {found.longest:,} tokens at this batch size")
        lines.append(f"largest batch  {found.largest_batch:,} at this length")
    for remedy in found.remedies:
        verdict = "fits" if remedy.fits else "does not fit"
        lines.append(f"{verdict + ':':14} {remedy.options} ({remedy.peak / GIB:.2f} GiB)")
    console.print("\n".join(lines), highlight=False)


def _memory_in_use() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
