"""`matt-fast compare-inits`."""

import json as json_module
from pathlib import Path
from typing import Annotated

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.display import print_initialised, print_initialised_head
from matt_fast.cli.output import command_output, plain
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.recipe.arguments import check_arguments
from matt_fast.support.checks import MANY, check_parent, check_range
from matt_fast.support.files import write_text
from matt_fast.training.options import TrainingOptions


def compare_inits(
    model: o.Model,
    tokenizer: o.Tokenizer,
    eval_data: o.HeldOutData,
    init: o.Inits,
    output: Annotated[Path | None, Option(help="JSON file to keep the results in, written anew after each.")] = None,
    data: o.InitData = None,
    init_head: o.InitHead = "same",
    donor: o.Donor = None,
    omp_k: o.OmpK = 64,
    parallel: o.Parallel = None,
    untie: o.Untie = False,
    eval_pieces: o.EvalPieces = 40,
    probe_steps: Annotated[
        int | None, Option(help="Also train each start for so many steps on --data, and measure again.")
    ] = None,
    objective: o.Objective = "token-distillation",
    lr: o.LearningRate = 3e-3,
    max_length: o.MaxLength = 512,
    batch_size: o.BatchSize = 4,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    seed: o.Seed = 0,
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Initialise a model for a new tokenizer in several ways and print what each costs, before and after a probe."""
    arguments = dict(locals())
    for name in ("output", "json", "quiet", "debug", "init", "probe_steps", "objective", "lr"):
        del arguments[name]
    with command_output(json, quiet, debug) as out:
        check_range("probe_steps", probe_steps, 1, MANY)
        options = TrainingOptions(objective=objective, steps=probe_steps or 1, lr=lr)
        if probe_steps is not None:
            arguments["probe"] = options
        for name in init:
            check_arguments(arguments | {"init": name})
        check_parent("output", output)
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.recipe.comparison import compare_initializers

            found = {"original": None, "results": []}

            def begin(name: str) -> None:
                if name != display.stage:
                    display.on_stage(name)

            def on_original(bits_per_byte: float) -> None:
                found["original"] = bits_per_byte
                print_initialised_head(out.console, bits_per_byte)
                begin(init[0])

            def on_result(result) -> None:
                found["results"].append(plain(result))
                if output is not None:
                    write_text(output, json_module.dumps(found, indent=1, ensure_ascii=False) + "\n")
                print_initialised(out.console, result)
                begin(init[min(len(found["results"]), len(init) - 1)])

            display.on_stage("original model")
            compare_initializers(
                **arguments,
                inits=init,
                on_original=on_original,
                on_result=on_result,
                on_progress=lambda name, done, total: display.on_progress("rows", done, total),
                on_piece=lambda done: display.on_progress("pieces", done, eval_pieces),
            )
        out.result(found)
