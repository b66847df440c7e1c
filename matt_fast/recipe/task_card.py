"""Task scores as a section of a model card."""

from collections.abc import Sequence
from pathlib import Path

from matt_fast.evaluation.tasks import Score, TaskScore
from matt_fast.recipe.card import cell
from matt_fast.support.files import write_text

BEGIN, END = "<!-- matt-fast: tasks -->", "<!-- matt-fast: end of tasks -->"
CARD = "README.md"


def tasks_section(rows: Sequence[TaskScore]) -> str:
    """Markdown: a heading, how the figures came about, and a table with a line for each metric of each task."""
    models = list(rows[0].scores)
    recovering = list(rows[0].recovered)
    titles = [*models, *(f"{x} - {models[0]}" for x in models[1:]), *(f"{x}: gap closed" for x in recovering)]
    lines = [
        "## Tasks",
        "",
        "Measured with lm-evaluation-harness; ± is the standard error, of differences that of the same questions.",
        *(
            [f"Gap closed: (score - {cell(models[1])}) / ({cell(models[0])} - {cell(models[1])})."]
            if recovering
            else []
        ),
        "",
        f"| task | metric | examples | questions | {' | '.join(map(cell, titles))} |",
        "|---|---|---|---|" + "---|" * len(titles),
    ]
    for row in rows:
        figures = [
            *(score_in_words(x) for x in row.scores.values()),
            *(score_in_words(x, "+") for x in row.differences.values()),
            *(share_in_words(x) for x in row.recovered.values()),
        ]
        arrow = "" if row.higher_is_better else " (less is better)"
        shots = "" if row.few_shot is None else row.few_shot
        lines.append(f"| {cell(row.task)} | {cell(row.metric)}{arrow} | {shots} | {row.n} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def score_in_words(score: Score, sign: str = "") -> str:
    """A score, or with sign "+" a difference, and its standard error."""
    stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.value:{sign}.4f}{stderr}"


def share_in_words(share: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "-" if share is None else f"{share:.0%}"


def write_section(folder: str | Path, section: str) -> None:
    """Put a section into the model card of a folder, at its end, or in place of the one that this put there before.

    Raises:
        FileNotFoundError: `folder` is not there.
        ValueError: the card has the beginning of a section without its end.
    """
    path = Path(folder) / CARD
    if not path.parent.is_dir():
        raise FileNotFoundError(f"card: wanted the folder of a model, got {str(folder)!r}")
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    marked = f"{BEGIN}\n{section}{END}\n"
    before, begin, rest = card.partition(f"{BEGIN}\n")
    _, end, behind = rest.partition(f"{END}\n")
    if begin and not end:
        raise ValueError(f"card: wanted {END!r} behind {BEGIN!r} in {str(path)!r}, got none")
    if begin:
        write_text(path, before + marked + behind)
    else:
        write_text(path, f"{card.rstrip()}\n\n{marked}" if card.strip() else marked)
