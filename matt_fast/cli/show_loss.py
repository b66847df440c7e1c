"""`matt-fast show loss`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.tables import print_table
from matt_fast.data.reading import check_texts
from matt_fast.model.folders import check_model_place
from matt_fast.show.choices import check_adapted, made_of
from matt_fast.support.checks import MANY, check_range

if TYPE_CHECKING:  # these import torch
    from matt_fast.show.loss import LossBySegment


def loss(
    folder: Annotated[Path, Argument(help="Output of a finished transfer.")],
    data: o.HeldOutData,
    model: Annotated[
        str | None, Option(help="Folder or hub name of the original model; the one that the run names by default.")
    ] = None,
    pieces: Annotated[int, Option(help="Pieces of 2,048 bytes to score, at most.")] = 15,
    limit: Annotated[int, Option(help="How many of the worst segments to show.")] = 20,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Show where the result predicts worse than the original: at new tokens, at old ones split otherwise, or behind.

    Both models are scored on held-out text, segment by segment, in float32. For causal models.
    """
    with command_output(json, quiet, debug) as out:
        check_range("pieces", pieces, 1, MANY)
        check_range("limit", limit, 0, MANY)
        if model is not None:
            check_model_place(model, "model")
        check_texts("data", data, text_field)
        check_adapted("folder", folder)
        model, _ = made_of("folder", folder, model)
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.alignment.vocabulary import VocabularyPair
            from matt_fast.data.documents import read_documents
            from matt_fast.show.loss import loss_by_segment
            from matt_fast.show.opening import open_whole

            documents = read_documents(data, split=split, text_field=text_field)
            display.on_stage("models")
            options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
            (source, original), (after, result) = (
                open_whole(place, name, **options) for place, name in ((model, "model"), (folder, "folder"))
            )
            sides = source.load_tokenizer(), after.load_tokenizer()
            vocabulary = VocabularyPair(*sides, len(original.get_input_embeddings().weight))
            display.on_stage("text")
            found = loss_by_segment(
                original,
                result,
                vocabulary,
                documents,
                pieces=pieces,
                worst=limit,
                on_piece=lambda done: display.on_progress("pieces", done, pieces),
            )
        _print_loss(out.console, found)
        out.result(found)


def _print_loss(console: Console, found: "LossBySegment") -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("segments with", "segments", "tokens", "original", "result", "difference"):
        table.add_column(name, justify="left" if name == "segments with" else "right", no_wrap=True)

    def line(name: str, segments: int, tokens: int, original: float, adapted: float) -> None:
        figures = f"{original:.4f}", f"{adapted:.4f}", f"{adapted - original:+.4f}"
        table.add_row(name, f"{segments:,}", f"{tokens:,}", *figures)

    for part in found.parts:
        line(part.kind, part.segments, part.tokens, part.original, part.adapted)
    counts = (sum(getattr(x, name) for x in found.parts) for name in ("segments", "tokens"))
    line("all, bits per byte", *counts, found.original, found.adapted)
    print_table(console, table)
    if found.worst:
        say(console, "Where the result loses most, bits per byte of the text and how often:")
    for x in found.worst:
        old, new = ("│".join(side) for side in (x.old, x.new))
        say(console, f"  {x.difference:+.5f} {x.count:5,}  {old}" + ("" if old == new else f"  →  {new}"))
