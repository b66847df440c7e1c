"""How deep to put the target layer: the same transfer at several depths, on the user's own data (paper, Figure 4)."""

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from matt_fast.model.teacher import Teacher
from matt_fast.recipe.curves import figure_class
from matt_fast.recipe.result import TransferResult
from matt_fast.recipe.run import Run
from matt_fast.recipe.transfer import transfer
from matt_fast.training.loop import Progress
from matt_fast.training.options import TrainingOptions

GIB = 1 << 30


@dataclass(frozen=True)
class Depth:
    """What one depth gave.

    Attributes:
        n_layers: the target layer, counted from 1.
        bits_per_byte: of the held-out text after training.
        seconds: of training, from the first batch on.
        memory: bytes in use at most in training; of the accelerator if there is one, else of the process.
    """

    n_layers: int
    bits_per_byte: float
    seconds: float
    memory: int


@dataclass(frozen=True)
class Sweep:
    """Attributes:
    original, initialised: bits per byte of the original model, and with the new tokenizer before training.
    depths: one entry for each depth, in their order.
    """

    original: float
    initialised: float
    depths: list[Depth]


def default_depths(depth: int) -> list[int]:
    """Sixths of a model's depth, in whole layers."""
    return sorted({max(1, round(depth * sixth / 6)) for sixth in range(1, 7)})


def sweep_layers(
    model: str | Path,
    tokenizer: str | Path,
    data: str | Path,
    output: str | Path,
    eval_data: str | Path,
    *,
    depths: Iterable[int] | None = None,
    on_depth: Callable[[Depth], None] = lambda depth: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    **options,
) -> Sweep:
    """Run `transfer` at several depths, each in a process of its own, and measure quality, time and memory.

    Args:
        model, tokenizer, data, eval_data: as in `transfer`; the held-out text is needed here. Paths and names only.
        output: folder to write; it must be new or empty. It gets depths.json and depths.png, anew after each depth, so
            that an error later on leaves what was measured; the models are not kept.
        depths: target layers to try; sixths of the model's depth if None.
        on_depth: called with each result.
        on_step, on_stage: as in `transfer`.
        **options: other arguments of `transfer`, but for `n_layers`.

    Raises:
        ValueError: a depth that the model does not have. What `transfer` raises.
        ImportError: matplotlib is missing.
    """
    figure_class()  # before hours of work
    Run(output).check_free(resume=False)
    hub = {name: options.get(name, False) for name in ("trust_remote_code", "allow_pickle")}
    teacher = Teacher(model, **hub)
    depths = default_depths(teacher.depth) if depths is None else list(depths)
    for depth in depths:
        if not 1 <= depth <= teacher.depth:
            raise ValueError(f"depths: wanted layers from 1 to {teacher.depth} for this model, got {depth}")
    arguments = {"model": model, "tokenizer": tokenizer, "data": data, "eval_data": eval_data, **options}
    arguments.setdefault("seed", 0)
    one_step = replace(options.get("training") or TrainingOptions(), steps=1, warmup_steps=0, decay_steps=0)
    on_stage("before training")
    start = _in_process(arguments | {"n_layers": depths[0], "training": one_step}).evaluations
    found = []
    for depth in depths:
        on_stage(f"layer {depth} of {teacher.depth}")
        result = _in_process(arguments | {"n_layers": depth}, on_step)
        bits = result.evaluations["trained"].bits_per_byte
        found.append(Depth(depth, bits, result.progress.seconds, result.training_memory))
        outcome = Sweep(start["original"].bits_per_byte, start["initialised"].bits_per_byte, found)
        _write(outcome, Path(output))
        on_depth(found[-1])
    return outcome


def _write(outcome: Sweep, folder: Path) -> None:
    """Both files, each under another name first."""
    folder.mkdir(parents=True, exist_ok=True)
    json_file, plot_file = folder / ".depths.json", folder / ".depths.png"
    json_file.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    plot(outcome, plot_file)
    for file in (json_file, plot_file):
        file.replace(folder / file.name.removeprefix("."))


def plot(outcome: Sweep, path: Path) -> None:
    """Draw quality, time and memory over the depth."""
    layers = [depth.n_layers for depth in outcome.depths]
    figure = figure_class()(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    curves = (
        ("bits per byte of held-out text", [depth.bits_per_byte for depth in outcome.depths]),
        ("seconds of training", [depth.seconds for depth in outcome.depths]),
        ("GiB in use at most", [depth.memory / GIB for depth in outcome.depths]),
    )
    for axis, (title, values) in zip(axes, curves, strict=True):
        axis.plot(layers, values, marker="o")
        axis.set(title=title, xlabel="target layer", xticks=layers)
        if axis is not axes[0]:
            axis.set_ylim(0, 1.1 * max(values))
    axes[0].axhline(outcome.initialised, linestyle="--", color="grey", label="before training")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def _in_process(arguments: dict, on_step: Callable[[Progress], None] = lambda progress: None) -> TransferResult:
    """Run one transfer in a fresh process, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_transfer, args=(theirs, arguments))
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "step":
                on_step(value)
                continue
            process.join(timeout=60)  # one that is killed leaves its semaphores behind
            if kind == "error":
                raise value
            return value
    except EOFError as error:
        process.join()
        raise RuntimeError(f"the process of a transfer ended with exit code {process.exitcode}") from error
    finally:
        process.kill()
        process.join()


def _transfer(connection, arguments: dict) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            step = lambda progress: connection.send(("step", progress))  # noqa: E731
            result = transfer(output=Path(folder) / "model", on_step=step, **arguments)
        connection.send(("result", result))
    except Exception as error:
        connection.send(("error", error))
