"""`matt-fast transfer`."""

import sys
from dataclasses import fields
from typing import Any

import typer

from matt_fast.cli import options as o
from matt_fast.cli.display import print_result, print_sweep
from matt_fast.cli.output import Output, command_output, plain, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.recipe.arguments import check_arguments
from matt_fast.training.options import TrainingOptions

TRAINING = [field.name for field in fields(TrainingOptions)]
OF_THE_COMMAND = ("config", "json", "quiet", "debug", "layer")


def transfer(
    context: typer.Context,
    model: o.Model,
    tokenizer: o.Tokenizer,
    data: o.TrainingData,
    output: o.OutputFolder,
    eval_data: o.EvalData = None,
    steps: o.Steps = 1000,
    epochs: o.Epochs = None,
    resume: o.Resume = None,
    config: o.Config = None,
    init: o.Init = "mean",
    init_head: o.InitHead = "same",
    donor: o.Donor = None,
    parallel: o.Parallel = None,
    map_tokens: o.MapTokens = None,
    freeze_shared: o.FreezeShared = True,
    objective: o.Objective = "token-distillation",
    layer: o.Layer = "third",
    lr: o.LearningRate = 3e-3,
    warmup_steps: o.WarmupSteps = 0,
    decay_steps: o.DecaySteps = None,
    accumulation: o.Accumulation = 1,
    max_grad_norm: o.MaxGradNorm = 1.0,
    moments: o.Moments = "lazy",
    metric: o.Metric = "mse",
    reduction: o.Reduction = "pairs",
    seed: o.Seed = 0,
    max_length: o.MaxLength = 512,
    batch_size: o.BatchSize = 4,
    packing: o.Packing = False,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    data_cache: o.DataCache = None,
    eval_pieces: o.EvalPieces = 40,
    device: o.Device = None,
    precision: o.Precision = "auto",
    backend: o.Backend = "auto",
    attn_implementation: o.Attention = None,
    checkpointing: o.Checkpointing = False,
    compile: o.Compile = False,
    quantization: o.Quantization = None,
    offload: o.Offload = None,
    checkpoint_every: o.CheckpointEvery = "auto",
    validate_every: o.ValidateEvery = None,
    patience: o.Patience = None,
    track: o.Track = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Transfer a model to a new tokenizer and write a folder that loads and generates."""
    given = dict(locals())
    del given["context"]
    typed = {name for name in given if context.get_parameter_source(name).name == "COMMANDLINE"}
    with command_output(json, quiet, debug) as out:
        arguments = transfer_arguments(given, typed)
        if layer == "sweep":
            check_arguments(arguments | {"output": None})
            _sweep(arguments, out)
        else:
            check_arguments(arguments)
            _transfer(arguments, out)


def transfer_arguments(given: dict[str, Any], typed: set[str]) -> dict[str, Any]:
    """The arguments of the function `transfer` for options of the command.

    Args:
        given: every option by its name.
        typed: those that are on the command line, not from a file or by default.

    Raises:
        ValueError, TypeError: an option has a wrong value, or two do not go together.
    """
    if {"steps", "epochs"} <= typed:
        raise ValueError(f"steps and epochs: wanted one of them, got {given['steps']} and {given['epochs']}")
    resumed, layer = given["resume"], given["layer"]
    if resumed is not None and given["output"].resolve() != resumed.resolve():
        raise ValueError(f"output: wanted {str(resumed)!r}, the run to go on with, got {str(given['output'])!r}")
    if layer not in ("third", "sweep") and not layer.isdecimal():
        raise ValueError(f"layer: wanted a number, 'third' or 'sweep', got {layer!r}")
    chosen = {name: given[name] for name in TRAINING}
    chosen["max_grad_norm"] = given["max_grad_norm"] or None
    arguments = {name: given[name] for name in given.keys() - {*TRAINING, *OF_THE_COMMAND}}
    arguments["training"] = TrainingOptions(**chosen)
    arguments["resume"] = resumed is not None
    arguments["map_tokens"] = list(given["map_tokens"] or ())
    if "steps" in typed:
        arguments["epochs"] = None
    if layer.isdecimal():
        arguments["n_layers"] = int(layer)
    return arguments


def _transfer(arguments: dict[str, Any], out: Output) -> None:
    with ProgressDisplay(out.console, arguments["training"].steps) as display:
        display.on_stage("libraries")
        from matt_fast.recipe.transfer import transfer as run

        callbacks = ("on_step", "on_stage", "on_progress", "on_message")
        result = run(**arguments, **{name: getattr(display, name) for name in callbacks})
    print_result(out.console, result)
    say(out.console, f"Written: {arguments['output']}")
    out.result({**plain(result), "worse_than_start": result.worse_than_start})
    if result.worse_than_start is not None:
        print(f"The result is worse than its start: {result.worse_than_start}", file=sys.stderr, flush=True)
        raise typer.Exit(1)


def _sweep(arguments: dict[str, Any], out: Output) -> None:
    if arguments["eval_data"] is None:
        raise ValueError("eval_data: wanted held-out text to compare depths on, got none")
    if arguments.pop("resume"):
        raise ValueError("resume: wanted a transfer at one layer, got a sweep, which cannot be gone on with")
    with ProgressDisplay(out.console, arguments["training"].steps) as display:
        display.on_stage("libraries")
        from matt_fast.recipe.sweep import sweep_layers

        outcome = sweep_layers(**arguments, on_step=display.on_step, on_stage=display.on_stage)
    print_sweep(out.console, outcome)
    say(out.console, f"Written: {arguments['output']}")
    out.result(outcome)
