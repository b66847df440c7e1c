"""`matt-fast show influence`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.initializers.choices import METHODS
from matt_fast.model.folders import check_model_place, check_tokenizer_place
from matt_fast.show.choices import check_adapted, check_output, made_of, read_text
from matt_fast.support.checks import MANY, check_choice, check_range
from matt_fast.support.plots import PICTURES

if TYPE_CHECKING:  # these import torch
    from matt_fast.show.influence import Influence

MOST = 20_000  # characters that are tokenised; fewer are shown
PAIRS = 5  # that are printed


def influence(
    output: Annotated[Path | None, Option(help="Picture to write: .png or .svg.")] = None,
    model: Annotated[
        str | None, Option(help="Folder or hub name of the original model; the one that --adapted was made of.")
    ] = None,
    tokenizer: Annotated[str | None, Option(help="New tokenizer, where there is no --adapted.")] = None,
    adapted: Annotated[
        Path | None, Option(help="Output of a finished transfer: shows the student after it, too.")
    ] = None,
    text: Annotated[str | None, Option(help="The text; as much of it as 256 tokens hold is shown.")] = None,
    file: Annotated[Path | None, Option(help=f"A file with the text: {o.TEXTS}.")] = None,
    layer: Annotated[
        int | None, Option(help="Counted from 1; the transfer's target layer, or a third of the depth.")
    ] = None,
    head: Annotated[str, Option(help="Counted from 0, or mean for the mean over all.")] = "mean",
    init: Annotated[
        str | None, Option(help=f"How new rows start: {', '.join(METHODS)}; as in the transfer, or mean.")
    ] = None,
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Show how strongly segments draw on each other, under both tokenizers, before and after a transfer.

    The strength is the norm of s[i, j] at one layer (paper, Figures 1 and 5), which training brings together.
    """
    with command_output(json, quiet, debug) as out:
        check_output(output, PICTURES)
        content, _ = read_text(text, file, MOST, text_field)
        check_range("layer", layer, 1, MANY)
        if head != "mean" and not head.isdecimal():
            raise ValueError(f"head: wanted a number from 0, or mean; got {head!r}")
        if init is not None:
            check_choice("init", init, METHODS)
        if model is not None:
            check_model_place(model, "model")
        if tokenizer is not None:
            check_tokenizer_place(tokenizer, "tokenizer")
        if adapted is None and (model is None or tokenizer is None):
            raise ValueError("adapted: wanted the output of a transfer, or model and tokenizer, got neither")
        if adapted is not None and tokenizer is not None:
            raise ValueError("tokenizer: wanted none beside adapted, which has its own")
        if adapted is not None:
            check_adapted("adapted", adapted)
        which = None if head == "mean" else int(head)
        options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        with ProgressDisplay(out.console, announce=False) as display:
            found, names, note = find(display, content, (model, tokenizer, adapted), layer, which, init, options)
            if output is not None:
                from matt_fast.show.influence_picture import influence_figure
                from matt_fast.support.plots import save

                display.on_stage("picture")
                save(influence_figure(found, names), output)
        _print_influence(out.console, found, note)
        matrices = {"teacher": found.teacher, **found.students}
        if output is not None:
            say(out.console, f"Written: {output}")
        out.result(
            {
                "layer": found.layer,
                "head": head,
                "segments": found.labels,
                "left_out": found.left_out,
                "influence": {name: x.tolist() for name, x in matrices.items()},
                "distance": {name: x.tolist() for name, x in found.distances.items()},
                "mean_distance": {name: found.mean_distance(name) for name in found.distances},
                "output": None if output is None else str(output),
            }
        )


def find(display: ProgressDisplay, text: str, places, layer: int | None, head: int | None, init: str | None, options):
    """(the influence, names of both tokenizers, a note) of the original model, a new tokenizer and an adapted model."""
    display.on_stage("libraries")
    from matt_fast.alignment.vocabulary import VocabularyPair
    from matt_fast.initializers import initial_rows
    from matt_fast.show.influence import find_influence
    from matt_fast.show.opening import open_model

    (model, tokenizer, adapted), record = places, None
    if adapted is not None:
        model, record = made_of("adapted", adapted, model)
        layer = layer or (None if record is None else record.result.get("n_layers"))
        init = init or ("unknown" if record is None else record.starts)
    init = init or "mean"
    known = init in METHODS
    display.on_stage("model")
    source, teacher = open_model(model, "model", layer, **options)
    layer = teacher.config.get_text_config(decoder=True).num_hidden_layers
    sides = source.load_tokenizer(), source.load_tokenizer(tokenizer or adapted)
    vocabulary = VocabularyPair(*sides, len(teacher.get_input_embeddings().weight))
    seed = 0 if record is None else record.options["seed"]
    start = initial_rows(teacher, vocabulary, init if known else "mean", seed)
    students = {"before": (source.trunk(teacher), start.input)}
    note = ""
    if adapted is not None:
        after, result = open_model(adapted, "adapted", layer, **options)
        students["after"] = after.trunk(result), result.get_input_embeddings().weight.detach()
        if not known:
            note = f"before: rows start as mean, since those of {init!r} cannot be made again here"
    display.on_stage("attention")
    found = find_influence(source.trunk(teacher), vocabulary, text, students, layer, head)
    return found, (Path(model).name, Path(tokenizer or adapted).name), note


def _print_influence(console: Console, found: "Influence", note: str) -> None:
    count = len(found.labels)
    cut = f", {found.left_out:,} more do not fit" if found.left_out else ""
    head = "mean over heads" if found.head is None else f"head {found.head}"
    say(console, f"layer {found.layer}, {head}; {count} segments{cut}")
    if note:
        say(console, note)
    for name, distances in found.distances.items():
        say(console, f"{name:7} mean distance from the teacher {found.mean_distance(name):.4g}; the largest:")
        for value, place in zip(*(x.tolist() for x in distances.flatten().topk(min(PAIRS, count))), strict=True):
            reads, read = found.labels[place // count], found.labels[place % count]
            say(console, f"          {value:.4g}  {reads} draws on {read}")
