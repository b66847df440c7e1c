"""`matt-fast show tokens`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.tables import print_table
from matt_fast.initializers.choices import METHODS
from matt_fast.model.folders import check_model_place
from matt_fast.runs.record import read_provenance
from matt_fast.show.choices import ORDERS, PAGES, TABLES, check_adapted, check_output, made_of
from matt_fast.support.checks import MANY, check_choice, check_range
from matt_fast.support.files import write_text

if TYPE_CHECKING:  # these import torch
    from matt_fast.show.tokens import TokenRow

LINES = 20  # in the terminal, where no limit is given


def tokens(
    folder: Annotated[Path, Argument(help="Output of a finished transfer.")],
    model: Annotated[
        str | None, Option(help="Folder or hub name of the original model; the one that the run names by default.")
    ] = None,
    search: Annotated[str | None, Option(help="Only tokens that have this in them.")] = None,
    sort: Annotated[str, Option(help=f"By {', '.join(ORDERS)}.")] = "moved",
    limit: Annotated[
        int | None, Option(help=f"So many tokens; by default {LINES} in the terminal, all in --output and --json.")
    ] = None,
    table: Annotated[str, Option(help="Rows of the input embedding, or of an output head of its own.")] = "input",
    output: Annotated[
        Path | None, Option(help="Page to write: .html, a table that can be sorted and searched.")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Show the new tokens of a transfer: how they started, how often they were seen, how far their rows moved."""
    with command_output(json, quiet, debug) as out:
        check_output(output, PAGES)
        check_choice("sort", sort, ORDERS)
        check_choice("table", table, TABLES)
        check_range("limit", limit, 1, MANY)
        if model is not None:
            check_model_place(model, "model")
        check_adapted("folder", folder)
        records = read_provenance(folder)
        model, record = made_of("folder", folder, model)
        starts = "unknown" if record is None else record.starts
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.alignment.vocabulary import VocabularyPair
            from matt_fast.initializers import initial_rows
            from matt_fast.report.tokens import tokens_page
            from matt_fast.show.opening import open_model
            from matt_fast.show.tokens import add_neighbours, choose, new_tokens

            display.on_stage("models")
            options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
            source, original = open_model(model, "model", 1, **options)
            after, result = open_model(folder, "folder", 1, **options)
            sides = source.load_tokenizer(), after.load_tokenizer()
            old, rows = (_table(x, table) for x in (original, result))
            vocabulary = VocabularyPair(*sides, len(old))
            start, note = None, f"Rows as they began are not shown: {starts!r} cannot be made again here."
            if record is not None and starts in METHODS:
                made = initial_rows(original, vocabulary, starts, record.options["seed"])
                start, note = getattr(made, table), f"Moved: how far from where {starts!r} put the row."
                if start is None:
                    start = made.input
            display.on_stage("tokens")
            everything = new_tokens(records, vocabulary, rows, start, recorded=table == "input")
            known = all(x.moved is not None for x in everything)
            order = "seen" if not known and sort == "moved" else sort
            found = choose(everything, search, order)
            shown = found[: limit or (LINES if output is None and not json else None)]
            shown = add_neighbours(
                shown, vocabulary, old, rows, start, lambda done, total: display.on_progress("tokens", done, total)
            )
            if output is not None:
                write_text(output, tokens_page(shown, len(everything), order, note))
        if output is None and not json:
            print_tokens(out.console, shown)
        starts = ", ".join(f"{count:,} {name}" for name, count in Counter(x.start for x in everything).most_common())
        unseen, strange = sum(not x.seen for x in everything), sum(x.stands_out for x in everything)
        say(
            out.console,
            f"{len(everything):,} new tokens ({starts}), {unseen:,} never seen in training; {strange:,} stand out.",
        )
        say(out.console, f"{len(shown):,} of {len(found):,} that match are shown. {note}")
        if output is not None:
            say(out.console, f"Written: {output}")
        out.result({"tokens": [vars(x) for x in shown], "matching": len(found), "new": len(everything), "moved": note})


def _table(model, name: str):
    """The rows of a model's table, on the CPU."""
    module = model.get_input_embeddings() if name == "input" else model.get_output_embeddings()
    if module is None:
        raise ValueError("table: wanted input, since the model has no output head; got output")
    return module.weight.detach()


def print_tokens(console: Console, shown: "list[TokenRow]") -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("token", "id", "seen", "norm", "moved"):
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    for name in ("started as", "nearest at the start", "nearest now"):
        table.add_column(name)
    for x in shown:
        moved = "" if x.moved is None else f"{x.moved:.3f}"
        figures = str(x.id), f"{x.seen:,}", f"{x.norm:.3f}", moved
        near = (" ".join(f"{token} {cosine:.2f}" for token, cosine in side) for side in (x.before, x.after))
        words = "│".join(x.pieces), *near
        style = "bold" if x.stands_out else ""
        table.add_row(Text(x.token, style), *figures, *(Text(word) for word in words))
    print_table(console, table)
