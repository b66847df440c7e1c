"""`matt-fast apply`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.model.folders import check_model_place
from matt_fast.recipe.arguments import check_arguments
from matt_fast.support.checks import check_new_folder


def apply(
    transferred: Annotated[str, Option("--from", help="Output folder of a transfer.")],
    sibling: Annotated[str, Option("--to", help="Model that was fine-tuned from the one that was transferred.")],
    output: o.OutputFolder,
    eval_data: Annotated[str | None, Option(help="Held-out text: measure bits per byte before and after.")] = None,
    eval_pieces: o.EvalPieces = 40,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Put the rows of a transfer into a sibling: a model of the same family, which gets the same tokenizer."""
    with command_output(json, quiet, debug, {"transferred": "from", "sibling": "to"}) as out:
        for name, value in (("transferred", transferred), ("sibling", sibling)):
            check_model_place(value, name)
        check_arguments({"eval_data": eval_data, "eval_pieces": eval_pieces, "text_field": text_field})
        check_new_folder("output", Path(output))
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.recipe.apply import STAY
            from matt_fast.recipe.apply import apply as run

            result = run(
                transferred,
                sibling,
                output,
                eval_data=eval_data,
                eval_pieces=eval_pieces,
                split=split,
                text_field=text_field,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                on_stage=display.on_stage,
                on_piece=lambda done: display.on_progress("pieces", done, eval_pieces),
            )
        say(out.console, f"tokens    {result.shared:,} shared, {result.new:,} new; shared rows alike to "
            f"{result.similarity:.4f} (median cosine)")  # fmt: skip
        if result.carried:
            say(out.console, f"carried   {len(result.carried):,} special tokens that the sibling alone has: "
                f"{', '.join(map(repr, result.carried[:5]))}{' …' if len(result.carried) > 5 else ''}")  # fmt: skip
        if result.healed:
            say(out.console, f"layers    {STAY}")
        for line in result.lost:
            say(out.console, f"lost      {line}")
        for name, figures in result.evaluations.items():
            say(
                out.console,
                f"{name:<9} {figures.bits_per_byte:.4f} bits per byte, {figures.bytes_per_token:.3f} bytes per token",
            )
        say(out.console, f"Written: {output}")
        out.result(result)
