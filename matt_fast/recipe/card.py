"""The model card that a transfer leaves beside the model: what was done, and what was measured."""

import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml

from matt_fast.evaluation.intervals import bits_in_words
from matt_fast.recipe.result import TransferResult
from matt_fast.support.printable import printable
from matt_fast.training.loop import Progress
from matt_fast.training.options import HealingOptions, TrainingOptions

STAGE_NAMES = {"original": "original model", "initialised": "after initialisation", "trained": "after training"}


def evaluation_rows(result: TransferResult) -> list[tuple[str, str, str]]:
    """(what, bits per byte with their interval, bytes per token) for each evaluation, as text."""
    rows = []
    for text, evaluations in ({"": result.evaluations} | result.other_texts).items():
        for name, found in evaluations.items():
            what = f"{text}: {STAGE_NAMES[name]}" if text else STAGE_NAMES[name]
            rows.append((what, bits_in_words(found), f"{found.bytes_per_token:.3f}"))
    return rows


def validation_line(result: TransferResult) -> str | None:
    """What validation during training found; None without it."""
    if not result.validation:
        return None
    best = min(bits for _, bits in result.validation)
    return (
        f"{len(result.validation)} validations, the best at step {result.best_step} with {best:.4f} bits per byte: its "
        "rows are the result"
    )


def training_line(progress: Progress) -> str:
    """How much training there was, and how often it went over the data."""
    if not progress.step:
        return "none: all rows are the original's"
    passes = _passes(progress)
    return f"{len(progress.losses)} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s, ended {passes}"


def _passes(progress: Progress) -> str:
    return "in the first pass over the data" if progress.epoch == 0 else f"in pass {progress.epoch + 1} over the data"


def skipped_lines(progress: Progress) -> list[str]:
    """What training left out: parts of the data, and steps in which no trainable row occurred."""
    skipped = dict(progress.skipped)
    if progress.steps_without_new_tokens:
        skipped["steps without new tokens"] = progress.steps_without_new_tokens
    return [f"{count:,} {reason}" for reason, count in skipped.items()]


def code(name: str) -> str:
    """A name as a code span of Markdown, which no sign in it ends: nothing in it is a link, HTML or another line."""
    name = printable(name).replace("\n", "\\n").replace("\t", "\\t") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    space = " " if name[0] in "` " or name[-1] in "` " else ""
    return f"{fence}{space}{name}{space}{fence}"


def cell(text: str) -> str:
    """A text as a cell of a Markdown table, which no sign in it ends."""
    plain = re.fullmatch(r"[\w ,:.-]+", text)
    return text if plain else code(text).replace("|", "\\|")


def model_card(
    result: TransferResult,
    model: str | Path,
    data: str | Path | None,
    init: str,
    freeze_shared: bool,
    training: TrainingOptions,
    healing: HealingOptions | None = None,
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads.

    Folders of this machine are named by their last part only.
    """
    here = Path(model).exists()
    base = Path(model).resolve().name if here else str(model)
    source = Path(data).resolve().name if data is not None and Path(data).exists() else str(data)
    init = Path(init).resolve().name if Path(init).exists() else init
    metadata = {"library_name": "transformers"} | ({} if here else {"base_model": printable(base)})
    metadata["tags"] = ["tokenizer-transfer", "matt-fast"]
    progress = result.progress
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000).rstrip(),
        "---",
        "",
        f"# {code(base)} with a new tokenizer",
        "",
        f"Made with matt-fast {version('matt-fast')}: the tokenizer of {code(base)} was replaced"
        + _embeddings(result, training)
        + f". {_other_weights(result)}",
        "",
        "## Vocabulary",
        "",
        f"- {result.shared} tokens are shared with the original, byte for byte or by their role, and have its rows"
        + (", unchanged." if freeze_shared else ", trained further."),
        f"- {result.new} tokens are new. {code(init)} made the first rows of {result.report.initialized}; "
        f"{result.report.subtoken_mean} were left to their sub-tokens, and {result.report.unspelled} to the mean of "
        "all rows, as the original's tokens cannot spell them.",
        f"- {result.seen} of the {result.trainable} trainable rows occurred in training; the others are as they "
        "started. `token_provenance.jsonl` tells it for each token.",
        "",
        "## Training",
        "",
        f"- {training_line(progress)}.",
        *([f"- The text was {code(source)}."] if progress.step and data is not None else []),
        *([f"- Snippets: {result.snippets.message()}."] if result.snippets is not None else []),
        *([f"- {line}."] if (line := validation_line(result)) else []),
        f"- The target layer was layer {result.n_layers} (counted from 1).",
        *(f"- {name}: {code(value) if isinstance(value, str) else value}" for name, value in asdict(training).items()),
    ]
    lines += _healing_lines(result, healing)
    if progress.losses:
        lines.append(f"- The loss went from {progress.losses[0]:.4g} to {progress.losses[-1]:.4g}.")
    lines += [f"- Skipped: {line}." for line in skipped_lines(progress)]
    if result.evaluations:
        scored = next(iter(result.evaluations.values()))
        lines += [
            "",
            "## Held-out text",
            "",
            f"{scored.n_bytes} bytes, in pieces of at most {scored.piece_bytes:,} bytes, each scored on its own"
            + (", by pseudo-likelihood (every seventh token masked)." if scored.masked else "."),
            "",
            "| | bits per byte (95% interval) | bytes per token |",
            "|---|---|---|",
            *(f"| {' | '.join((cell(what), *figures))} |" for what, *figures in evaluation_rows(result)),
        ]
    lines += _completion_lines(result)
    return "\n".join(lines) + "\n"


def _completion_lines(result: TransferResult) -> list[str]:
    if not result.completions:
        return []
    lines = ["", "## Completions", "", "Of the same beginnings of held-out text, greedy, as many bytes of each."]
    for row in result.completions:
        lines += ["", f"- {code(row['prompt'])}"]
        lines += [f"  - {name}: {code(row[name])}" for name in ("original", "adapted")]
    return lines


def _embeddings(result: TransferResult, training: TrainingOptions) -> str:
    if not result.new:
        return " by one whose tokens it has, which keep their embeddings"
    if not result.progress.step:
        return "; the embeddings of the new tokens were made of those of the old ones"
    return (
        f", and the embeddings of the new tokens were trained ({training.objective}) so that the model with them does "
        "what it did before (after Model-Aware Tokenizer Transfer, arXiv 2510.21954)"
    )


def _other_weights(result: TransferResult) -> str:
    if result.healing is None:
        return "All other weights are those of the original model."
    how = {
        "lora": "Adapters of low rank beside the linear layers were then trained together with the rows, and merged",
        "outer": "The first and last layers were then trained together with the rows",
        "full": "All layers were then trained together with the rows",
    }
    return f"{how[result.healing.method]} ({result.healing.trained_numbers:,} numbers)."


def _healing_lines(result: TransferResult, healing: HealingOptions | None) -> list[str]:
    if healing is None:
        return []
    progress = result.healing.progress
    options = (f"{name}: {code(value) if isinstance(value, str) else value}" for name, value in asdict(healing).items())
    first, last = (f"{progress.losses[i]:.4g}" for i in (0, -1))
    return [
        f"- Rows and layers together: {len(progress.losses)} steps, {progress.tokens} tokens, {progress.seconds:.0f} "
        f"s; the loss went from {first} to {last} ({', '.join(options)})."
    ]
