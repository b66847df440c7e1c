"""`matt-fast plan`."""

from typing import Annotated

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.display import print_layouts, print_plan
from matt_fast.cli.output import command_output
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.model.folders import check_model_place, check_tokenizer_place
from matt_fast.support.checks import LENGTH, MANY, ROWS, check_choice, check_range
from matt_fast.training.options import HealingOptions, TrainingOptions


def plan(
    model: o.Model,
    tokenizer: o.Tokenizer,
    length: Annotated[int, Option(help="Tokens of a chunk, --max-length of a transfer.")] = 512,
    batch: Annotated[int, Option(help="Chunks, --batch-size of a transfer.")] = 4,
    vram: Annotated[float | None, Option(help="GiB that a step may use: search what fits.")] = None,
    layer: o.PlannedLayer = None,
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
    with command_output(json, quiet, debug) as out:
        training = TrainingOptions(
            objective=objective,
            accumulation=accumulation,
            checkpointing=checkpointing,
            quantization=quantization,
            offload=offload,
            shard=shard,
        )
        healing = None
        if heal is not None:
            chosen = {"objective": heal_objective, "rank": heal_rank, "outer_layers": heal_outer_layers}
            healing = HealingOptions(heal, **chosen)
        for name, value, most in (("heal_rank", heal_rank, ROWS), ("heal_outer_layers", heal_outer_layers, ROWS)):
            check_range(name, value, 1, most)
        for name, value in (("teraflops", teraflops), ("vram", vram), ("bandwidth", bandwidth)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: wanted a number above 0, got {value}")
            check_range(name, value, 0, MANY)
        counts = (
            ("length", length, LENGTH),
            ("batch", batch, ROWS),
            ("layer", layer, MANY),
            ("processes", processes, MANY),
        )
        for name, value, most in counts:
            check_range(name, value, 1, most)
        if shard and processes == 1:
            raise ValueError("shard: wanted processes of 2 or more with it, got 1")
        check_choice("precision", precision, ("no", "bf16"))
        check_choice("device", device, ("cuda", "cpu"))
        check_model_place(model, "model")
        check_tokenizer_place(tokenizer, "tokenizer")
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("planning")
            from matt_fast.planning.plan import plan as run

            found = run(
                model,
                tokenizer,
                length=length,
                batch_size=batch,
                n_layers=layer,
                training=training,
                healing=healing,
                precision=precision,
                freeze_shared=freeze_shared,
                untie=untie,
                device=device,
                vram=None if vram is None else int(vram * (1 << 30)),
                processes=processes,
                bandwidth=bandwidth,
                trust_remote_code=trust_remote_code,
            )
        print_plan(out.console, found, teraflops)
        print_layouts(out.console, found, processes, None if vram is None else int(vram * (1 << 30)))
        out.result(found)
