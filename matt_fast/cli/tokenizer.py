"""`matt-fast tokenizer extend`, `train`, `merge`, `prune` and `report`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.tokenizer_report import report
from matt_fast.data.tokenizer_arguments import check_tokenizer_arguments
from matt_fast.support.checks import TOKENIZER_KINDS
from matt_fast.support.printable import some

if TYPE_CHECKING:
    from rich.console import Console

    from matt_fast.tokenizers.result import NewTokenizer

SHOWN = 12  # tokens
MANY_MARKS = 0.01  # a share of letters that is worth a line

tokenizer = typer.Typer(
    no_args_is_help=True, help="Make a tokenizer for `transfer`: extend, train, merge, prune; and judge it: report."
)

Base = Annotated[str, Option(help="Folder or hub name of the model, or of its tokenizer.")]
Data = Annotated[str, Option(help=f"Text: {o.TEXTS}, a folder of them, or a hub dataset.")]
MaxTokenLength = Annotated[
    int | None, Option(help="Characters of a learned token; 16 for SentencePiece, else no limit, by default.")
]
JoinMarks = Annotated[
    bool, Option("--join-marks", help="Keep vowel signs with their letters, where words are cut at them (Hindi, Thai).")
]
OUTSIDE = ("json", "quiet", "debug")


@tokenizer.command()
def extend(
    model: Base,
    output: o.OutputFolder,
    data: Annotated[str | None, Option(help="Text to learn new tokens from.")] = None,
    add: Annotated[int, Option(help="New tokens to learn, at most.")] = 5000,
    words: Annotated[Path | None, Option(help="Text file, a word a line: each becomes a token.")] = None,
    max_token_length: MaxTokenLength = None,
    join_marks: JoinMarks = False,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Add tokens that a text wants, by going on with the merges of a BPE tokenizer; all that it has stays."""
    _run("extend", dict(locals()))


@tokenizer.command()
def train(
    data: Data,
    size: Annotated[int, Option(help="Tokens of the vocabulary, at most, special ones included.")],
    output: o.OutputFolder,
    kind: Annotated[str, Option(help=f"{', '.join(TOKENIZER_KINDS)}.")] = "byte-bpe",
    like: Annotated[
        str | None,
        Option(help="Model or tokenizer with BPE to build it like: splits, special tokens and chat template are kept."),
    ] = None,
    max_token_length: MaxTokenLength = None,
    join_marks: JoinMarks = False,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Train a tokenizer from scratch on a text."""
    _run("train", dict(locals()))


@tokenizer.command()
def merge(
    model: Base,
    other: Annotated[str, Option(help="Tokenizer or model whose tokens are appended.")],
    output: o.OutputFolder,
    join_marks: JoinMarks = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Append the tokens that another tokenizer has to a BPE tokenizer that lacks them, as the paper does."""
    _run("merge", dict(locals()))


@tokenizer.command()
def prune(
    model: Base,
    keep: Annotated[int, Option(help="Tokens to keep, special ones included.")],
    data: Data,
    output: o.OutputFolder,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Remove the tokens of a BPE tokenizer that a text uses least."""
    _run("prune", dict(locals()))


tokenizer.command()(report)


def _run(name: str, given: dict[str, Any]) -> None:
    """Check what can be told by values, call the function of that name, and print what was made."""
    with command_output(given["json"], given["quiet"], given["debug"]) as out:
        arguments = {key: value for key, value in given.items() if key not in OUTSIDE}
        check_tokenizer_arguments(arguments)
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast import tokenizers

            function: Callable[..., NewTokenizer] = getattr(tokenizers, name)
            result = function(**arguments, on_stage=display.on_stage)
        print_new_tokenizer(out.console, result)
        out.result(result)


def print_new_tokenizer(console: "Console", result: "NewTokenizer") -> None:
    """A line for each thing that there is to say."""
    before = "" if result.before is None else f" ({result.before:,} before)"
    say(console, f"tokens           {result.tokens:,}{before}")
    for what, tokens in (("new", result.added), ("gone", result.removed)):
        if tokens:
            say(console, f"{what:<16} {len(tokens):,}: {some(tokens, SHOWN)}")
    if result.cut_tokens:
        what, tokens = "since a mark is its letter's now, no word has these", result.cut_tokens
        say(console, f"cut              {what} {len(tokens):,} of the base any more: {some(tokens, SHOWN)}")
    for reason in dict.fromkeys(result.left_out.values()):
        those = [text for text, why in result.left_out.items() if why == reason]
        say(
            console,
            f"left out         {len(those):,}, since each {reason}: {some(those, SHOWN)}",
        )
    if result.bytes_per_token is not None:
        before = "" if result.bytes_per_token_before is None else f" ({result.bytes_per_token_before:.2f} before)"
        say(console, f"bytes per token  {result.bytes_per_token:.2f}{before}")
    if result.cut_at_marks > MANY_MARKS:
        what = "of the letters are signs at which it cuts words, as its base does; with --join-marks it does not"
        say(console, f"cut at marks     {result.cut_at_marks:.0%} {what}")
