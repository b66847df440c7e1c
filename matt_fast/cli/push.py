"""`matt-fast push`, and what of it a transfer does."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from matt_fast.cli import options as o
from matt_fast.cli.output import Output, command_output, say
from matt_fast.support.printable import printable

if TYPE_CHECKING:  # it imports huggingface_hub when it is called
    from matt_fast.recipe.push import Target


def push(
    folder: Annotated[Path, Argument(help="Output of a transfer.")],
    to: Annotated[str, Option("--to", help="Repository on the hub, OWNER/NAME.")],
    public: o.Public = False,
    also: Annotated[list[str] | None, Option(help="Push this too: adapter, report.html or run. Several times.")] = None,
    yes: o.Yes = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Put an adapted model on the Hugging Face hub, privately unless --public; what goes up is listed first."""
    with command_output(json, quiet, debug) as out:
        from matt_fast.recipe.push import files_to_push

        files_to_push(folder, also or ())
        out.result(push_files(folder, check_push(to, public, yes, "to"), yes, out, also or ()))


def check_push(name: str | None, public: bool, yes: bool, argument: str = "push_to_hub") -> "Target":
    """The repository to push to, if there is someone to ask and the login may write there.

    Args:
        name, public, yes: options of the command.
        argument: what errors call the name.

    Raises:
        ValueError, OSError: what `find_target` raises; no terminal to ask on, and no `yes`.
    """
    if name is None:
        raise ValueError(f"public: wanted {argument} with it, got none")
    from matt_fast.recipe.push import check_name, find_target

    check_name(name, argument)
    if not yes and not has_terminal():
        raise ValueError("yes: wanted --yes, as there is no terminal to ask on before the push")
    return find_target(name, public, argument)


def has_terminal() -> bool:
    """Whether there is someone to ask."""
    return sys.stdin.isatty()


def push_files(folder: Path, target: "Target", yes: bool, out: Output, also: list[str] | tuple[str, ...] = ()) -> dict:
    """List what goes up, ask, and push it; returns what was done, for machines."""
    from matt_fast.recipe.push import files_to_push
    from matt_fast.recipe.push import push as run

    files = files_to_push(folder, also)
    table = Table(box=None, pad_edge=False, title=Text(f"To {target.described}:"), title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in files:
        table.add_row(Text(printable(name)), decimal(size))
    out.console.print(table)
    total = sum(size for _, size in files)
    say(out.console, f"{len(files)} files, {decimal(total)}")
    for name in target.replaced(files):
        say(out.console, f"Goes away there, as no part of this model: {name}")
    if not yes and not typer.confirm("Push them?", err=True):
        say(out.console, f"Nothing was pushed. To do it: {target.command(folder, files)}")
        raise typer.Exit(1)
    url = run(folder, target, files)
    say(out.console, f"Pushed: {url}")
    return {"url": url, "files": dict(files), "private": not target.public}
