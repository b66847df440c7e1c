"""`matt-fast tokenizer`: tokenizers made and judged."""

import typer

from matt_fast.cli.tokenizer_report import report

tokenizer = typer.Typer(no_args_is_help=True, help="Tokenizers: made and judged.")

for command in (report,):
    tokenizer.command()(command)
