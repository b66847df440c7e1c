"""What the site shows beside docs/: pages from elsewhere in the repository, and the options of the command line.

mkdocs calls the functions that begin with "on_". Links are written as files lie on disk: they work in a checkout too.
"""

import posixpath
import re
from pathlib import Path

import typer
from mkdocs.structure.files import File

from matt_fast.cli import app

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/*.md", "benchmarks/*.png")
ELSEWHERE += ("examples/*.py", "examples/*.ipynb")
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")


def on_files(files, config):
    """Add the files of `ELSEWHERE`, where they lie, and the page of the command line."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to other files of the repository at their places in the site, where docs/ is the root."""
    place = page.file.src_uri
    on_disk = place if (ROOT / place).exists() else f"docs/{place}"

    def in_site(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(on_disk), match[0]))
        if not (ROOT / target).is_file():
            return match[0]
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(place) or ".")

    return LINK.sub(in_site, markdown)


def on_page_content(html, page, config, files):
    """Leave out what docstrings say to the tests only."""
    return re.sub(r"Long because [^.<]+\.\s*", "", html)


def cli_page() -> str:
    """Every command with its options, as the program has them."""
    lines = ["# Command line", "", "Made from the program. `matt-fast COMMAND --help` prints the same.", ""]
    for name, command in commands("matt-fast", typer.main.get_command(app)):
        context = typer.Context(command, info_name=name)
        lines += [f"## `{name}`", "", command.help.split("\f")[0].strip(), ""]
        panels: dict[str, list[str]] = {}
        for option in command.params:
            if not option.hidden:
                panel = option.rich_help_panel or "Options"
                panels.setdefault(panel, []).append(row(*option.get_help_record(context)))
        for panel, rows in panels.items():
            lines += [f"| {panel} | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def row(names: str, text: str) -> str:
    """A line of a table."""
    for sign, written in (("|", "\\|"), ("*", "\\*"), ("[", "\\["), ("<", "&lt;"), ("\n", " ")):
        text = text.replace(sign, written)
    return f"| `{names}` | {text} |"


def commands(name: str, command) -> list[tuple[str, typer.core.TyperCommand]]:
    """(name as it is typed, command) of every command below this one."""
    if not hasattr(command, "commands"):
        return [(name, command)]
    return [pair for short, below in command.commands.items() for pair in commands(f"{name} {short}", below)]
