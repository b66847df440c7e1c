"""`matt-fast show`: segments, attention influence, loss and new tokens."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.segments_display import print_segments
from matt_fast.cli.show_influence import influence
from matt_fast.cli.show_loss import loss
from matt_fast.cli.show_tokens import tokens
from matt_fast.model.folders import check_tokenizer_place
from matt_fast.show.choices import PAGES, check_output, read_text
from matt_fast.support.files import write_text
from matt_fast.support.plots import PICTURES

show = typer.Typer(no_args_is_help=True, help="Segments, attention influence, loss by segment and new tokens.")

# Characters that are shown: what a terminal, a picture and a browser can take.
TERMINAL, PICTURE, PAGE = 20_000, 4_000, 60_000


def segments(
    old: Annotated[str, Option("--old", "--model", help="Folder or hub name of the model, or of its tokenizer.")],
    new: Annotated[str, Option("--new", "--tokenizer", help="Folder or hub name of the new tokenizer.")],
    text: Annotated[str | None, Option(help="The text.")] = None,
    file: Annotated[Path | None, Option(help=f"A file with the text: {o.TEXTS}.")] = None,
    output: Annotated[Path | None, Option(help="Picture or page to write: .png, .svg or .html.")] = None,
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Show a text under both tokenizers, with the segments that training compares (paper, Figure 2)."""
    with command_output(json, quiet, debug) as out:
        check_output(output, (*PICTURES, *PAGES))
        most = TERMINAL if output is None else PAGE if output.suffix.lower() in PAGES else PICTURE
        content, note = read_text(text, file, most, text_field)
        for name, value in (("old", old), ("new", new)):
            check_tokenizer_place(value, name)
        from matt_fast.model.tokenizer_files import load_tokenizer
        from matt_fast.show.pieces import find_segments

        sides = [
            load_tokenizer(x, name, trust_remote_code=trust_remote_code) for name, x in (("old", old), ("new", new))
        ]
        found = find_segments(content, *sides)
        if output is None:
            print_segments(out.console, found)
        elif output.suffix.lower() in PAGES:
            from matt_fast.show.segments_page import segments_page

            write_text(output, segments_page(found, Path(old).name, Path(new).name, note))
        else:
            from matt_fast.show.segments_picture import segments_figure
            from matt_fast.support.plots import save

            save(segments_figure(found), output)
        counts = [sum(len(getattr(x, side)) for x in found.segments) for side in ("old", "new")]
        one_to_one = found.kinds[1, 1]
        say(
            out.console,
            f"{len(found.segments):,} segments: {counts[0]:,} old tokens, {counts[1]:,} new; {one_to_one:,} are one "
            f"token on both sides. {note}".rstrip(),
        )
        if output is not None:
            say(out.console, f"Written: {output}")
        out.result(
            {
                "segments": [
                    {"text": x.text, **{side: [vars(y) for y in getattr(x, side)] for side in ("old", "new")}}
                    for x in found.segments
                ],
                "right_to_left": found.right_to_left,
                "left_out": bool(note),
                "output": None if output is None else str(output),
            }
        )


for command in (segments, influence, loss, tokens):
    show.command()(command)
