"""`matt-fast evaluate`."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.evaluation_display import print_measured
from matt_fast.cli.output import command_output, plain, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.transfer import held_out_texts
from matt_fast.data.reading import check_text_file, check_texts, format_of, read_texts
from matt_fast.evaluation.tasks import TaskOptions, check_installed
from matt_fast.model.folders import check_model_place, check_tokenizer_place
from matt_fast.recipe.arguments import PRECISIONS, check_device
from matt_fast.support.checks import MANY, ROWS, check_choice, check_parent, check_range
from matt_fast.support.files import write_text
from matt_fast.support.printable import short_names

TEXT, TASKS, BESIDE = "Bits per byte", "Tasks (lm-evaluation-harness)", "Completions and speed"
TEXT_NAME = "text"  # of one that was given no name
EXAMPLES = 1000  # in front of a question: more than any model holds


def evaluate(
    model: Annotated[list[str], Option(help="Folder or hub name; several times: the first is compared with.")],
    data: Annotated[
        list[str] | None,
        Option(
            help=f"Held-out text: {o.TEXTS}, a folder, or a hub dataset. NAME=TEXT, several times, for several.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, Option(help="Another tokenizer than the model's own.", rich_help_panel=TEXT)
    ] = None,
    pieces: Annotated[int | None, Option(help="Score at most so many pieces.", rich_help_panel=TEXT)] = None,
    piece_bytes: Annotated[
        int | None,
        Option(
            help="Bytes of a piece, each scored on its own; 2,048, or 480 for a masked model.", rich_help_panel=TEXT
        ),
    ] = None,
    tasks: Annotated[str | None, Option(help="Names of tasks or groups, joined by ','.", rich_help_panel=TASKS)] = None,
    few_shot: Annotated[
        int | None, Option(help="Solved examples in front of a question; as the task has it.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[int | None, Option(help="Questions of each task, at most.", rich_help_panel=TASKS)] = None,
    chat_template: Annotated[
        bool, Option("--chat-template", help="Ask through the tokenizer's chat template.", rich_help_panel=TASKS)
    ] = False,
    batch_size: Annotated[int, Option(help="Sequences scored at a time.", rich_help_panel=TASKS)] = 1,
    task_folder: Annotated[
        Path | None, Option(help="Folder with tasks of your own, YAML files.", rich_help_panel=TASKS)
    ] = None,
    card: Annotated[
        Path | None, Option(help="Model folder whose README.md gets the table of tasks.", rich_help_panel=TASKS)
    ] = None,
    prompts: Annotated[
        Path | None,
        Option(
            help=f"File of prompts, which each model completes: {o.TEXTS}; of plain text one a line, else one a row.",
            rich_help_panel=BESIDE,
        ),
    ] = None,
    speed: Annotated[
        bool, Option("--speed", help="Time reading and writing of the first text.", rich_help_panel=BESIDE)
    ] = False,
    output: Annotated[Path | None, Option(help="File that gets everything as JSON.", rich_help_panel=o.OUTPUT)] = None,
    precision: Annotated[str, Option(help="Of the weights: auto (as stored), no (float32) or bf16.")] = "auto",
    split: o.Split = "train",
    text_field: o.TextField = "text",
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Measure models side by side: bits per byte of held-out text, tasks, completions and speed.

    Bits per byte compare models with different tokenizers. Masked language models are scored by pseudo-likelihood;
    compare their figures with each other only.

    \f
    Long because it has every option.
    """
    given = dict(locals())
    with command_output(json, quiet, debug) as out:
        arguments = evaluation_arguments(given)
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.recipe.evaluating import evaluate_models
            from matt_fast.recipe.task_card import tasks_section, write_section

            callbacks = {"on_stage": display.on_stage, "on_progress": display.on_progress}
            found = evaluate_models(**arguments, **callbacks)
        print_measured(out.console, found)
        if card is not None:
            write_section(card, tasks_section(found.tasks))
        if output is not None:
            write_text(output, json_format.dumps(plain(found), indent=1, allow_nan=False) + "\n")
        for path in (card, output):
            if path is not None:
                say(out.console, f"Written: {path}")
        out.result(found)


def evaluation_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `evaluate_models` for options of the command.

    Raises:
        ValueError, OSError, ImportError: an option has a wrong value, or two do not go together.
    """
    check_choice("precision", given["precision"], PRECISIONS)
    check_device(given["device"])
    check_range("pieces", given["pieces"], 1, MANY)
    check_range("piece_bytes", given["piece_bytes"], 4, MANY)  # the longest character
    check_range("few_shot", given["few_shot"], 0, EXAMPLES)
    check_range("limit", given["limit"], 1, MANY)
    check_range("batch_size", given["batch_size"], 1, ROWS)
    texts = held_out_texts(given["data"], "data")
    texts = texts if isinstance(texts, dict) else {} if texts is None else {TEXT_NAME: texts}
    for model in given["model"]:
        check_model_place(model, "model")
    if given["tokenizer"] is not None:
        check_tokenizer_place(given["tokenizer"], "tokenizer")
    for value in texts.values():
        check_texts("data", value, given["text_field"])
    if given["tokenizer"] is not None and len(given["model"]) > 1:
        raise ValueError(f"tokenizer: wanted one model with it, got {len(given['model'])}")
    if given["speed"] and not texts:
        raise ValueError("speed: wanted text (data) to read and write, got none")
    if not (texts or given["tasks"] or given["prompts"]):
        raise ValueError("data, tasks, prompts: wanted at least one of them, got none")
    check_parent("output", given["output"])
    shared = ("tokenizer", "pieces", "piece_bytes", "speed", "precision", "split", "text_field", "device")
    return {name: given[name] for name in (*shared, "trust_remote_code", "allow_pickle")} | {
        "models": _names(given["model"]),
        "texts": texts,
        "tasks": _task_options(given),
        "prompts": () if given["prompts"] is None else _prompts(given["prompts"], given["text_field"]),
    }


def _task_options(given: dict[str, Any]) -> TaskOptions | None:
    if given["tasks"] is None:
        for name in ("few_shot", "limit", "task_folder", "card"):
            if given[name] is not None:
                raise ValueError(f"{name}: wanted tasks with it, got none")
        if given["chat_template"]:
            raise ValueError("chat_template: wanted tasks with it, got none")
        return None
    check_installed()
    names = tuple(dict.fromkeys(x.strip() for x in given["tasks"].split(",") if x.strip()))
    if not names:
        raise ValueError(f"tasks: wanted names joined by ',', got {given['tasks']!r}")
    for name in ("task_folder", "card"):
        if given[name] is not None and not given[name].is_dir():
            raise FileNotFoundError(f"{name}: wanted a folder that is there, got {str(given[name])!r}")
    options = {name: given[name] for name in ("few_shot", "limit", "chat_template", "batch_size")}
    return TaskOptions(names, **options, folder=given["task_folder"])


def _names(models: list[str]) -> dict[str, str]:
    """Name -> place of each model: the last parts of the place, as many as tell them apart.

    Raises:
        ValueError: a model comes twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"model: wanted another model each time, got {', '.join(models)}")
    return dict(zip(short_names(models), models, strict=True))


def _prompts(file: Path, text_field: str) -> list[str]:
    """Lines of a plain text, or rows of another file of texts, that have text.

    Raises:
        ValueError: another format, no text, or what `read_texts` raises.
        OSError: the file cannot be read.
    """
    check_text_file(file, "prompts")
    texts = (text or "" for text in read_texts(file, text_field, "prompts"))
    found = [x for x in ("".join(texts).splitlines() if format_of(file) == "text" else texts) if x.strip()]
    if not found:
        raise ValueError(f"prompts: wanted a line or row with text in {str(file)!r}, got none")
    return found
