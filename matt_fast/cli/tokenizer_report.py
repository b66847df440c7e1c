"""`matt-fast tokenizer report`."""

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
from matt_fast.data.reading import check_texts
from matt_fast.model.folders import check_tokenizer_place
from matt_fast.show.choices import check_output
from matt_fast.support.plots import PICTURES
from matt_fast.support.printable import printable, visible

if TYPE_CHECKING:  # these import torch
    from matt_fast.tokenizers.report import Report, TokenizerFigures

SOME = 8  # tokens and probes that are printed
LAST = 1000  # added tokens


def report(
    tokenizers: Annotated[list[str], Argument(help="Folders or hub names; the others are compared with the first.")],
    data: Annotated[
        str | None,
        Option(help=f"Text: {o.TEXTS}, a folder of them, or a hub dataset."),
    ] = None,
    by: Annotated[
        list[str] | None,
        Option(help="NAME=TEXT, of a language for example: figures of its own. Give it several times."),
    ] = None,
    output: Annotated[
        Path | None, Option(help="Picture to write, .png or .svg: bytes per token over the tokens added to the first.")
    ] = None,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Compare tokenizers on texts: length, tokens that are never used, round trip, digits and spaces.

    Take text that no tokenizer was made of, or what it saves will look better than it is.
    """
    with command_output(json, quiet, debug) as out:
        check_output(output, PICTURES)
        places = {} if data is None else {"text": data}
        for value in by or ():
            name, sign, place = value.partition("=")
            if not (name and sign and place) or name in places:
                raise ValueError(f"by: wanted NAME=TEXT with a name of its own, got {value!r}")
            places[name] = place
        if not places:
            raise ValueError("data: wanted text to tokenise, in --data or --by, got none")
        for name, place in places.items():
            check_texts("data" if name == "text" else f"by {name}", place, text_field)
        for place in tokenizers:
            check_tokenizer_place(place, "tokenizers")
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.data.documents import read_documents
            from matt_fast.model.tokenizer_files import load_tokenizer
            from matt_fast.tokenizers.report import report as run

            options = {"trust_remote_code": trust_remote_code}
            sides = [load_tokenizer(place, "tokenizers", **options) for place in tokenizers]
            texts = {name: read_documents(x, split=split, text_field=text_field) for name, x in places.items()}
            display.on_stage("texts")
            found = run(dict(zip(_names(tokenizers), sides, strict=True)), texts, display.on_progress)
            if output is not None:
                from matt_fast.support.plots import save
                from matt_fast.tokenizers.savings_picture import savings_figure

                save(savings_figure(found), output)
        _print_report(out.console, found)
        if output is not None:
            say(out.console, f"Written: {output}")
        out.result({"tokenizers": found.tokenizers, "output": None if output is None else str(output)})


def _names(places: list[str]) -> list[str]:
    """The last part of each place, or all of it where that would name two."""
    names = [Path(place).name or place for place in places]
    return [
        name if names.count(name) == 1 else f"{i}: {place}"
        for i, (name, place) in enumerate(zip(names, places, strict=True), 1)
    ]


def _print_report(console: Console, found: "Report") -> None:
    for text, first in found.tokenizers[0].texts.items():
        table = Table(
            title=Text(printable(f"{text}, {first.bytes:,} bytes")), title_justify="left", box=None, pad_edge=False
        )
        table.add_column("")
        for name in ("tokens", "bytes per\ntoken", "characters\nper token", "speed-up", "not\nrestored"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in found.tokenizers:
            x = row.texts[text]
            figures = f"{x.tokens:,}", f"{x.bytes_per_token:.3f}", f"{x.characters_per_token:.3f}", f"{x.speedup:.2f}"
            table.add_row(*(Text(printable(word)) for word in (row.name, *figures)), f"{x.not_restored:,}")
        print_table(console, table)
        console.print()
    say(
        console,
        "The speed-up is an expectation: how many fewer tokens there are, if each costs the model the same.",
        "dim",
    )
    for row in found.tokenizers:
        say(console, row.name, "bold")
        say(console, "\n".join(f"  {line}" for line in _lines(row, row is not found.tokenizers[0], found)))


def _lines(row: "TokenizerFigures", compared: bool, found: "Report"):
    yield f"{row.tokens:,} tokens, {row.special:,} of them special"
    if compared:
        yield f"{row.shared:,} shared with the first, {row.new:,} new, {row.missing:,} of the first missing"
    yield f"{row.unreachable:,} that no text gives{_some(row.unreachable_some)}"
    yield f"{row.unseen:,} never seen in the texts{_some(row.unseen_some)}"
    for text, figures in row.texts.items():
        if figures.example is not None:
            wanted, got = map(visible, figures.example)
            yield f"does not give back {figures.not_restored:,} pieces of {text}: {wanted} comes back as {got}"
    for kind, differences in row.differences.items():
        if differences:
            yield f"{kind} otherwise than the first:"
        for _, one, other in differences[:SOME]:
            yield f"  {one}  →  {other}"
        if len(differences) > SOME:
            yield f"  and {len(differences) - SOME} more (--json)"
    for text, savings in found.curves.get(row.name, {}).items():
        enough = ", ".join(f"{float(share):.0%} by {count:,}" for share, count in row.enough[text].items())
        many = min(LAST, row.added)
        last, which = savings.saved_by_last(many), f"the last {many:,}" if many < row.added else "all of them"
        yield f"{text}: of what {row.added:,} added tokens save, {enough}; {which} make it {last:.2%} shorter"
    if compared and row.no_curve:
        yield f"no curve: {row.no_curve}"


def _some(tokens: list[str]) -> str:
    return f": {' '.join(tokens[:SOME])}{' …' if len(tokens) > SOME else ''}" if tokens else ""
