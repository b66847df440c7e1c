"""The model card that a transfer leaves beside the model: what was done, and what was measured."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from matt_fast.evaluation.intervals import bits_in_words
from matt_fast.recipe.base_card import FORMAT, Base, base_metadata, is_hub_name
from matt_fast.recipe.command import command_line, last_parts
from matt_fast.recipe.result import Healing, TransferResult
from matt_fast.report.words import DIGITS
from matt_fast.runs.record import HELD_OUT
from matt_fast.support.printable import printable
from matt_fast.support.version import own_version
from matt_fast.training.objectives import reads_layers
from matt_fast.training.options import split_objectives
from matt_fast.training.state import Progress

OBJECT = re.compile(r"<\w+>")  # how `resolved_config` writes one

STAGE_NAMES = {"original": "original model", "initialised": "after initialisation", "trained": "after training"}


def evaluation_rows(result: TransferResult) -> list[tuple[str, str, str]]:
    """(what, bits per byte with their interval, bytes per token) for each evaluation, as text."""
    rows = []
    for text, evaluations in ({result.text: result.evaluations} | result.other_texts).items():
        for name, found in evaluations.items():
            what = STAGE_NAMES[name] if text == HELD_OUT else f"{text}: {STAGE_NAMES[name]}"
            rows.append((what, bits_in_words(found), f"{found.bytes_per_token:.3f}"))
    return rows


def validation_line(trained: TransferResult | Healing) -> str | None:
    """What validation during the training of rows, or of rows and layers, found; None without it."""
    if not trained.validation:
        return None
    count, best = len(trained.validation), trained.best_step
    if not best:  # other texts were worse from the first one on, or the disk was full
        kept = "what this training began with" if best == 0 else "what was there at the end"
        return f"{count} validations, of none of which the weights were kept: the result is {kept}"
    what = "rows and layers" if isinstance(trained, Healing) else "rows"
    bits = dict(trained.validation)[best]
    return f"{count} validations, the best at step {best} with {bits:.4f} bits per byte: its {what} are the result"


def training_line(progress: Progress) -> str:
    """How much training there was, and how often it went over the data."""
    if not progress.step:
        return "none: rows are as they started"
    passes = _passes(progress)
    return f"{len(progress.losses)} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s, ended {passes}"


def _passes(progress: Progress) -> str:
    return "in the first pass over the data" if progress.epoch == 0 else f"in pass {progress.epoch + 1} over the data"


def skipped_lines(result: TransferResult) -> list[str]:
    """What training left out: parts of the data, and steps in which no trainable row occurred."""
    phases = [result.progress, *([] if result.healing is None else [result.healing.progress])]
    skipped: Counter[str] = Counter()
    for progress in phases:
        skipped |= Counter(progress.skipped)  # both read the same data
    skipped["steps without new tokens"] = sum(progress.steps_without_new_tokens for progress in phases)
    return [f"{count:,} {reason}" for reason, count in (+skipped).items()]


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
    options: Mapping[str, Any],
    base: Base,
    lost: Sequence[str] = (),
    *,
    pipeline_tag: str | None = None,
    processes: int = 1,
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads.

    Folders and files of this machine are named by their last part only.

    Args:
        result: of the transfer.
        options: of `resolved_config`: what the model was made with.
        base: what the original model's own card says. Its licence is taken over; its languages are named in the text
            only, as nobody measured what the new model does in them: `options` tell the language of the new one.
        lost: lines that `save_result` gave.
        pipeline_tag: the hub's name of what the model is for; None for none.
        processes: that trained together.
    """
    name, source, teacher = (str(last_parts(x, options[x])) for x in ("model", "data", "teacher"))
    progress = result.progress
    lines = [
        "---",
        _metadata(result, options, base, pipeline_tag),
        "---",
        "",
        f"# {code(name)} {'trained on' if result.report.own else 'with a new tokenizer'}",
        "",
        f"Made with matt-fast {own_version()}: the tokenizer of {code(name)} "
        f"{_embeddings(result, options['objective'])}. {_other_weights(result)} {FORMAT}",
        *_languages(options, base),
        "",
        "## Vocabulary",
        "",
        *_rows(result, options),
        f"- {_seen(result)}",
        *lost_lines(lost),
        "",
        "## Training",
        "",
        *([] if result.healing is not None and not progress.step else [f"- {training_line(progress)}."]),
        *([f"- The text was {code(source)}."] if _trained(result) and options["data"] is not None else []),
        *([f"- The teacher was {code(teacher)}."] if _trained(result) and options["teacher"] is not None else []),
        *([f"- Snippets: {result.snippets.message()}."] if result.snippets is not None else []),
        *([f"- Rehearsal: {result.rehearsal.message()}."] if result.rehearsal is not None else []),
        *([f"- {line}."] if (line := validation_line(result)) else []),
    ]
    if progress.losses:
        if reads_layers(split_objectives("objective", options["objective"])):
            lines.append(f"- The target layer was layer {result.n_layers} (counted from 1).")
        lines.append(f"- The loss went from {progress.losses[0]:.4g} to {progress.losses[-1]:.4g}.")
    lines += _healing_lines(result, options)
    lines += [f"- Skipped: {line}." for line in skipped_lines(result)]
    lines += [*_held_out(result), *_completion_lines(result), *_command(options, processes)]
    return "\n".join(lines) + "\n"


def lost_lines(lost: Sequence[str]) -> list[str]:
    """A section on what the result could not take over; none where that is nothing."""
    return ["", "## Not taken over", "", *(f"- {code(x)}" for x in lost)] if lost else []


def _rows(result: TransferResult, options: Mapping[str, Any]) -> list[str]:
    """Which tokens are shared, and where the rows of the others come from."""
    report, kept = result.report, "unchanged" if options["freeze_shared"] else "trained further"
    original, init = (code(str(last_parts(x, options[x]))) for x in ("teacher", "init"))
    if report.own:
        return [
            f"- {result.shared} tokens are shared with {original}, byte for byte or by their role; rows: {kept}.",
            f"- {result.new} more have rows that train on.",
        ]
    made = f"{init} made the first rows of {report.initialized}"
    if report.subtoken_mean:
        made += f"; {report.subtoken_mean} were left to their sub-tokens"
    if report.unspelled:
        made += f"; {report.unspelled} to the mean of all rows, as the original's tokens cannot spell them"
    return [
        f"- {result.shared} tokens are shared with the original, byte for byte or by their role, and have its rows, "
        f"{kept}.",
        *([f"- {result.new} tokens are new. {made}."] if result.new else []),
    ]


def _seen(result: TransferResult) -> str:
    """How many rows training saw, and where more of it is."""
    if not result.trainable:
        return "`token_provenance.jsonl` tells for each token which row it has."
    return (
        f"{result.seen} of the {result.trainable} trainable rows occurred in training; the others are as they started. "
        "`token_provenance.jsonl` tells it for each token."
    )


def _completion_lines(result: TransferResult) -> list[str]:
    if not result.completions:
        return []
    lines = ["", "## Completions", "", "Behind the same words of held-out text, greedy, as many bytes of each."]
    for row in result.completions:
        lines += ["", f"- {code(row['prompt'])}"]
        lines += [f"  - {name}: {code(row[name])}" for name in ("original", "adapted")]
    return lines


def _held_out(result: TransferResult) -> list[str]:
    if not result.evaluations:
        return []
    scored = next(iter(result.evaluations.values()))
    return [
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


def _command(options: Mapping[str, Any], processes: int) -> list[str]:
    """The command line that makes the model again, in a fence that nothing in it ends."""
    command = command_line(options, processes)
    fence = "`" * (1 + max(2, *map(len, re.findall("`+", command)), 0))
    objects = ", objects that were given in Python by their names" if OBJECT.search(command) else ""
    note = f"Folders and files of the machine that it was made on are named by their last part{objects}."
    return ["", "## Make it again", "", f"{fence}sh", command, fence, "", note]


def _metadata(result: TransferResult, options: Mapping[str, Any], base: Base, pipeline_tag: str | None) -> str:
    """The card's YAML."""
    data = str(options["data"] or "")
    scores = [
        EvalResult(
            task_type=pipeline_tag or "text-generation",
            dataset_type=re.sub(r"\W+", "-", printable(text)).strip("-").lower() or "text",
            dataset_name=printable(text),
            metric_type="bits_per_byte",
            metric_name="bits per byte",
            metric_value=round(found["trained"].bits_per_byte, DIGITS),
        )
        for text, found in ({result.text: result.evaluations} | result.other_texts).items()
        if "trained" in found
    ]
    named = is_hub_name(data)
    found = base_metadata(
        base,
        pipeline_tag,
        datasets=[data] if named else None,
        language=list(options.get("language") or ()) or None,
        model_name=printable(Path(options["output"]).name) if scores else None,
        eval_results=scores or None,
        base_model_relation="finetune" if base.name is not None and _trained(result) else None,
    )
    return found.to_yaml(line_break="\n")


def _trained(result: TransferResult) -> bool:
    return bool(result.progress.step or result.healing is not None)


def _languages(options: Mapping[str, Any], base: Base) -> list[str]:
    if options.get("language") or not base.languages:
        return []
    names = ", ".join(map(code, base.languages))
    line = f"The original's card names these languages: {names}. How well this model does in them, it does not tell."
    return ["", line]


def _embeddings(result: TransferResult, objective: str) -> str:
    if not result.new:
        return "was replaced by one whose tokens it has, which keep their embeddings"
    if not result.progress.step:
        made = "was replaced; the embeddings of the new tokens were made of those of the old ones"
        return "stayed" if result.report.own else made
    goal = " on the text" if objective == "ntp" else " so that the model with them does what it did before"
    source = " (after Model-Aware Tokenizer Transfer, arXiv 2510.21954)" if "aim" in objective else ""
    was = "stayed" if result.report.own else "was replaced"
    return f"{was}, and the embeddings of the new tokens were trained ({objective}){goal}{source}"


def _other_weights(result: TransferResult) -> str:
    if result.healing is None:
        return "All other weights are those of the original model."
    how = {
        "lora": "Adapters of low rank beside the linear layers were then trained together with the rows, and merged",
        "outer": "The first and last layers were then trained together with the rows",
        "full": "All layers were then trained together with the rows",
    }
    return f"{how[result.healing.method]} ({result.healing.trained_numbers:,} numbers)."


def _healing_lines(result: TransferResult, options: Mapping[str, Any]) -> list[str]:
    if result.healing is None:
        return []
    progress = result.healing.progress
    first, last = (f"{progress.losses[i]:.4g}" for i in (0, -1))
    return [
        f"- Rows and layers together ({options['heal_objective']}): {len(progress.losses)} steps, {progress.tokens:,} "
        f"tokens, {progress.seconds:.0f} s, ended {_passes(progress)}; the loss went from {first} to {last}.",
        *([f"- {line}."] if (line := validation_line(result.healing)) else []),
    ]
