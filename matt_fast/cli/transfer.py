"""`matt-fast transfer`."""

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from matt_fast.cli import options as o
from matt_fast.cli.defaults import AUTO
from matt_fast.cli.display import print_result, print_sweep
from matt_fast.cli.output import Output, command_output, plain, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.push import check_push, push_files
from matt_fast.recipe.arguments import check_arguments
from matt_fast.recipe.recipes import RECIPES, as_options
from matt_fast.training.options import HEAL_NAMES, HealingOptions, TrainingOptions

if TYPE_CHECKING:
    from matt_fast.recipe.push import Target

HEALING = {"method": "heal"} | {
    x.name: HEAL_NAMES.get(x.name, f"heal_{x.name}") for x in fields(HealingOptions) if x.name != "method"
}
TRAINING = [field.name for field in fields(TrainingOptions)]
OF_THE_COMMAND = ("recipe", "config", "json", "quiet", "debug", "layer", "push_to_hub", "public", "yes")


def transfer(
    context: typer.Context,
    model: o.Model,
    tokenizer: o.Tokenizer,
    output: o.OutputFolder,
    data: o.TrainingData = None,
    eval_data: o.EvalData = None,
    steps: o.Steps = 1000,
    epochs: o.Epochs = None,
    recipe: o.Recipe = None,
    resume: o.Resume = None,
    config: o.Config = None,
    init: o.Init = "mean",
    init_head: o.InitHead = "same",
    donor: o.Donor = None,
    omp_k: o.OmpK = 64,
    parallel: o.Parallel = None,
    map_tokens: o.MapTokens = None,
    freeze_shared: o.FreezeShared = True,
    untie: o.Untie = False,
    teacher: o.OtherTeacher = None,
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
    alm_temperature: o.AlmTemperature = 100.0,
    alm_divergence: o.AlmDivergence = "kl",
    heal: o.Heal = None,
    heal_steps: o.HealSteps = 200,
    heal_lr: o.HealRate = 1e-3,
    heal_rows_lr: o.HealRowsRate = 3e-3,
    heal_objective: o.HealObjective = "segment-kl",
    heal_rank: o.HealRank = 16,
    heal_outer_layers: o.HealOuterLayers = 2,
    heal_max_worse: o.HealMaxWorse = 0.02,
    keep_adapter: o.KeepAdapter = False,
    language: o.Language = None,
    push_to_hub: o.PushToHub = None,
    public: o.Public = False,
    yes: o.Yes = False,
    seed: o.Seed = 0,
    max_length: o.MaxLength = 512,
    batch_size: o.BatchSize = 4,
    packing: o.Packing = False,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    per_token: o.PerToken = None,
    snippets: o.Snippets = None,
    rehearse: o.Rehearse = 0,
    data_cache: o.DataCache = None,
    prepared: o.Prepared = None,
    data_workers: o.DataWorkers = None,
    eval_pieces: o.EvalPieces = 40,
    completions: o.Completions = 3,
    device: o.Device = None,
    precision: o.Precision = "auto",
    backend: o.Backend = "auto",
    attn_implementation: o.Attention = None,
    checkpointing: o.Checkpointing = False,
    compile: o.Compile = False,
    quantization: o.Quantization = None,
    offload: o.Offload = None,
    shard: o.Shard = False,
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
    """Transfer a model to a new tokenizer and write a folder that loads and generates.

    \f
    Long because it has every option.
    """
    given = dict(locals())
    del given["context"]
    typed = {name for name in given if context.get_parameter_source(name).name == "COMMANDLINE"}
    with command_output(json, quiet, debug, lasting=True) as out:
        arguments = transfer_arguments(given, typed)
        if recipe is not None:
            used = {name: arguments.get(name, given[name]) for name in RECIPES[recipe]}
            say(out.console, f"recipe {recipe}: {as_options(used)}", "dim")
        if layer == "sweep":
            if push_to_hub is not None:
                raise ValueError("push_to_hub: wanted a transfer at one layer, got a sweep, which writes no model")
            check_arguments(arguments | {"output": None})
            _sweep(arguments, out)
        else:
            if os.environ.get("WORLD_SIZE", "1") == "1":  # several processes tell each other what is wrong
                check_arguments(arguments)
            target = None
            if push_to_hub is not None or public:
                target = check_push(push_to_hub, public, yes)
            _transfer(arguments, out, target, yes)


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
    if resumed not in (None, AUTO) and given["output"].resolve() != resumed.resolve():
        raise ValueError(f"output: wanted {str(resumed)!r}, the run to go on with, got {str(given['output'])!r}")
    if layer not in ("third", "sweep") and not layer.isdecimal():
        raise ValueError(f"layer: wanted a number, 'third' or 'sweep', got {layer!r}")
    chosen = {name: given[name] for name in TRAINING}
    chosen["max_grad_norm"] = given["max_grad_norm"] or None
    arguments = {name: given[name] for name in given.keys() - {*TRAINING, *HEALING.values(), *OF_THE_COMMAND}}
    arguments["training"] = TrainingOptions(**chosen)
    arguments["healing"] = None
    if given["heal"] is not None:
        arguments["healing"] = HealingOptions(**{field: given[name] for field, name in HEALING.items()})
    elif alone := sorted(typed & set(HEALING.values())):
        raise ValueError(f"{alone[0]}: wanted heal with it, got none")
    if _trains_on(given) and "init" not in typed and given["init"] == RECIPES[given["recipe"]].get("init"):
        arguments["init"] = "mean"  # the recipe's is for rows that begin; these go on from what they are
    arguments["resume"] = "auto" if resumed == AUTO else resumed is not None
    arguments["eval_data"] = held_out_texts(given["eval_data"])
    arguments |= {name: list(given[name] or ()) for name in ("map_tokens", "language")}
    if "steps" in typed:
        arguments["epochs"] = None
    if layer.isdecimal():
        arguments["n_layers"] = int(layer)
    return arguments


def _trains_on(given: dict[str, Any]) -> bool:
    """Whether a recipe is to train a result on, which has its tokenizer already."""
    places = (Path(given[name]).resolve() for name in ("model", "tokenizer"))
    return given["recipe"] is not None and given["teacher"] is not None and len({*places}) == 1


def held_out_texts(given: list[str] | str | None, argument: str = "eval_data") -> str | dict[str, str] | None:
    """The argument `eval_data` for what the option was given: places, or NAME=PLACE.

    Args:
        given: of the option.
        argument: what errors call it.

    Raises:
        ValueError: several places of which one has no name, or a name that is given twice.
    """
    given = [given] if isinstance(given, str) else given or []
    pairs = [("", x) if Path(x).exists() or "=" not in x else tuple(x.split("=", 1)) for x in given]
    if len(pairs) < 2 and not any(name for name, _ in pairs):
        return pairs[0][1] if pairs else None
    names = [name for name, _ in pairs]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{argument}: wanted NAME=TEXT with another name for each text, got {', '.join(given)}")
    return dict(pairs)


def _transfer(arguments: dict[str, Any], out: Output, target: "Target | None" = None, yes: bool = False) -> None:
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
        if target is not None:
            say(out.console, f"Not pushed; to do it: {target.command(arguments['output'])}")
        raise typer.Exit(1)
    if target is not None and out.main:
        push_files(arguments["output"], target, yes, out)


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
