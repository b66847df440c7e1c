"""The command line: `matt-fast transfer`, `doctor`, `plan` and the others, each in a file of its own."""

import re
from typing import Annotated

import typer
from typer.core import TyperGroup

from matt_fast.cli.apply import apply
from matt_fast.cli.compare import compare_inits
from matt_fast.cli.doctor import doctor
from matt_fast.cli.evaluate import evaluate
from matt_fast.cli.output import clear_errors
from matt_fast.cli.plan import plan
from matt_fast.cli.prepare import prepare
from matt_fast.cli.push import push
from matt_fast.cli.report import report
from matt_fast.cli.show import show
from matt_fast.cli.tokenizer import tokenizer
from matt_fast.cli.transfer import transfer
from matt_fast.support.threads import wait_passively
from matt_fast.support.version import own_version


class _Commands(TyperGroup):
    def parse_args(self, context: typer.Context, words: list[str]) -> list[str]:
        """Refuse empty values, of shell variables that are not set: an empty path would be the folder one is in."""
        looked_at = [] if context.resilient_parsing else words  # not while a shell completes them
        with clear_errors():
            for before, word in zip(("", *looked_at), looked_at, strict=False):
                if re.fullmatch("(--[a-z-]+=)?", word):
                    name = (word or before).strip("-=").replace("-", "_") if "--" in before + word else "arguments"
                    raise ValueError(f"{name}: wanted a value, got an empty one")
        return super().parse_args(context, words)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"matt-fast {own_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Give a pretrained language model a new tokenizer and keep what the model knows."""
    wait_passively()  # commands import torch later


for command in (transfer, prepare, doctor, plan, compare_inits, evaluate, apply, report, push):
    app.command()(command)
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(show, name="show")
