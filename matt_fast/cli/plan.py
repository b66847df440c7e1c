"""`matt-fast plan`."""

from typing import Annotated

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.display import print_layouts, print_plan
from matt_fast.cli.output import command_output
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.planning.arguments import check_plan
from matt_fast.support.checks import MANY, check_positive
from matt_fast.support.units import GIB
from matt_fast.training.options import HealingOptions, TrainingOptions


def plan(
    model: o.Model,
    tokenizer: o.Tokenizer,
    length: Annotated[int, Option("--length", "--max-length", help="Tokens of a chunk.")] = 512,
    batch: Annotated[int, Option("--batch", "--batch-size", help="Chunks.")] = 4,
    vram: Annotated[float | None, Option(help="GiB that a step may use: search what fits.")] = None,
    layer: o.PlannedLayer = None,
    steps: Annotated[int, Option(help="Updates of a transfer; 0 for healing alone.")] = 1000,
    objective: o.Objective = "token-distillation",
    heal: o.Heal = None,
    heal_objective: o.HealObjective = "segment-kl",
    heal_rank: o.HealRank = 16,
    heal_outer_layers: o.HealOuterLayers = 2,
    accumulation: o.Accumulation = 1,
    checkpointing: o.Checkpointing = False,
    quantization: o.Quantization = None,
    offload: o.Offload = None,
    shard: o.Shard = False,
    processes: Annotated[int, Option(help="Processes that train together; figures are of each of them.")] = 1,
    bandwidth: Annotated[
        float, Option(help="10⁹ bytes that a process sends to the others in a second; 25 is a network of 200 Gbit/s.")
    ] = 25.0,
    precision: Annotated[str, Option(help="Of the frozen weights: no (float32) or bf16.")] = "bf16",
    freeze_shared: o.FreezeShared = True,
    untie: o.Untie = False,
    device: Annotated[str, Option(help="cuda or cpu.")] = "cuda",
    teraflops: Annotated[
        float | None, Option(help="10¹² operations that your device does in a second: adds a modelled time.")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Predict memory and work of a training step from configurations alone, and what fits; no weights are loaded.

    \f
    Long because it has every option.
    """
    with command_output(json, quiet, debug, {"batch_size": "batch", "n_layers": "layer"}) as out:
        for name, value in (("teraflops", teraflops), ("vram", vram)):
            check_positive(name, value, MANY)
        training = TrainingOptions(
            objective=objective,
            steps=steps,
            accumulation=accumulation,
            checkpointing=checkpointing,
            quantization=quantization,
            offload=offload,
            shard=shard,
        )
        chosen = {"objective": heal_objective, "rank": heal_rank, "outer_layers": heal_outer_layers}
        healing = HealingOptions(heal or "lora", **chosen)
        room = None if vram is None else int(vram * GIB)
        arguments = {
            "model": model,
            "tokenizer": tokenizer,
            "length": length,
            "batch_size": batch,
            "n_layers": layer,
            "training": training,
            "healing": healing if heal else None,
            "precision": precision,
            "freeze_shared": freeze_shared,
            "untie": untie,
            "device": device,
            "vram": room,
            "processes": processes,
            "bandwidth": bandwidth,
            "trust_remote_code": trust_remote_code,
        }
        check_plan(arguments)
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("planning")
            from matt_fast.planning.plan import plan as run

            found = run(**arguments)
        print_plan(out.console, found, teraflops)
        print_layouts(out.console, found, processes, room)
        out.result(found)
