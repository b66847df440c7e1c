"""What a person sees during and after a transfer: the stages, a progress bar, one table."""

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from matt_fast.card import evaluation_rows
from matt_fast.recipe import TransferResult
from matt_fast.training import Progress as TrainingProgress

GIB = 1 << 30


class ProgressDisplay:
    """A context manager whose methods are the callbacks of `transfer`.

    Args:
        console: where to print.
        steps: training steps to come.
    """

    def __init__(self, console: Console, steps: int):
        self.console = console
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("training", total=steps, figures="", visible=False)

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def on_stage(self, stage: str) -> None:
        self.console.print(f"[bold]{stage}[/bold]")

    def on_step(self, progress: TrainingProgress) -> None:
        rate = progress.tokens / progress.seconds
        figures = f"loss {progress.loss:.3g} · {rate:,.0f} tokens/s · {_memory_in_use() / GIB:.2f} GiB"
        self.bar.update(self.task, completed=progress.step, figures=figures, visible=True)


def result_table(result: TransferResult) -> Table:
    """The figures of a transfer in one table."""
    table = Table(title="Tokenizer transfer", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("bytes per token", justify="right")
    for row in evaluation_rows(result):
        table.add_row(*row)
    progress = result.progress
    table.caption_justify = "left"
    table.caption = (
        f"{result.shared:,} shared tokens, {result.new:,} new, {result.seen:,} of {result.trainable:,} trained rows "
        f"seen\n{len(progress.losses)} steps, {progress.tokens:,} tokens; "
        f"{progress.seconds:.0f} s of training, {sum(result.seconds.values()):.0f} s in all; "
        f"peak memory {result.peak_memory / GIB:.2f} GiB"
    )
    if skipped := ", ".join(f"{count:,} {reason}" for reason, count in progress.skipped.items()):
        table.caption += f"\nskipped: {skipped}"
    return table


def _memory_in_use() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
