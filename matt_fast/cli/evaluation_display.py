"""What a person sees of `matt-fast evaluate`: a table for each text, each task and the speed, and completions."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from matt_fast.cli.output import say
from matt_fast.cli.tables import print_table
from matt_fast.support.printable import printable
from matt_fast.support.units import GIB, MIB

if TYPE_CHECKING:  # these import torch
    from matt_fast.evaluation.speed import Speed
    from matt_fast.evaluation.tasks import TaskScore
    from matt_fast.recipe.evaluating import Measured, TextScore


def print_measured(console: Console, found: "Measured") -> None:
    """All that was measured."""
    for text, scores in found.texts.items():
        _print_text(console, text, scores)
    for task in dict.fromkeys(row.task for row in found.tasks):
        _print_task(console, [row for row in found.tasks if row.task == task])
    for row in found.completions:
        print_completion(console, row.prompt, row.written)
    if found.speed:
        _print_speed(console, found.speed)


def print_completion(console: Console, prompt: str, written: dict[str, str]) -> None:
    """What each model writes behind the same prompt."""
    say(console, prompt, "dim")
    for model, text in written.items():
        say(console, f"  {model}: {text!r}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(printable(title), "bold"), title_justify="left", title_style="")
    table.add_column("", overflow="fold")
    for name in columns:  # figures stay whole, and long names of models are wrapped
        table.add_column(Text(printable(name)), justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _print_text(console: Console, text: str, scores: dict[str, "TextScore"]) -> None:
    from matt_fast.evaluation.intervals import in_words

    first = next(iter(scores.values()))
    several = len(scores) > 1
    table = _table(text, "bits per byte", *(["times the first"] if several else []), "bytes/token")
    for model, score in scores.items():
        ratio = "" if score.ratio is None else f"{score.ratio:.4f}{in_words(score.ratio_interval)}"
        bits = f"{score.evaluation.bits_per_byte:.4f}{in_words(score.interval)}"
        _add(table, model, bits, *([ratio] if several else []), f"{score.evaluation.bytes_per_token:.3f}")
    print_table(console, table)
    scored = first.evaluation
    parts = [f"{scored.n_bytes:,} bytes, {scored.n_tokens:,} tokens"]
    if first.interval is not None:
        few = ", so few that they are too narrow" if first.interval.few else ""
        parts.append(f"95% intervals over {first.interval.units:,} {first.interval.of}{few}")
    if scored.without_text:
        parts.append(f"passed over {scored.without_text:,} documents without text")
    say(console, "; ".join(parts), "dim")


def _print_task(console: Console, rows: list["TaskScore"]) -> None:
    from matt_fast.recipe.task_card import score_in_words, share_in_words

    first = rows[0]
    shots = "" if first.few_shot is None else f", {first.few_shot} examples"
    columns = ["metric", "score", *(["to the first"] if first.differences else [])]
    columns += ["gap closed"] if first.recovered else []
    table = _table(f"{first.task}: {first.n:,} questions{shots}", *columns)
    for row in rows:
        for model, score in row.scores.items():
            cells = [model, row.metric, score_in_words(score)]
            difference = row.differences.get(model)
            cells += [score_in_words(difference, "+") if difference else ""] if first.differences else []
            cells += [share_in_words(row.recovered[model]) if model in row.recovered else ""] if first.recovered else []
            _add(table, *cells)
    print_table(console, table)


def _print_speed(console: Console, found: dict[str, "Speed"]) -> None:
    from matt_fast.evaluation.speed import middle

    table = _table("Characters a second", "reading", "writing", "times the first", "embeddings", "cache of 1,000")
    for model, speed in found.items():
        reading, writing = (
            f"{value:,.1f} ({low:,.1f} to {high:,.1f})"
            for value, low, high in (middle(speed.reading), middle(speed.writing))
        )
        ratios = f"{middle(speed.reading_ratio)[0]:.3f}, {middle(speed.writing_ratio)[0]:.3f}"
        cache = "-" if speed.cache_bytes is None else f"{speed.cache_bytes / MIB:.2f} MiB"
        _add(table, model, reading, writing, ratios, f"{speed.embedding_bytes / GIB:.3f} GiB", cache)
    print_table(console, table)
    say(console, "Median of the rounds, and least to most; reading is prefill, writing is generation.", "dim")
