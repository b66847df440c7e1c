"""How deep to put the target layer: the same transfer at several depths, on the user's own data (paper, Figure 4)."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path

from matt_fast.model.teacher import Teacher
from matt_fast.recipe.isolated import transfer_apart
from matt_fast.recipe.processes import check_alone
from matt_fast.recipe.transfer import transfer
from matt_fast.runs.folder import Run, damaged_files
from matt_fast.support.checks import checked, made_of
from matt_fast.support.files import write_text
from matt_fast.support.plots import figure_class, save
from matt_fast.support.units import GIB
from matt_fast.support.version import own_version
from matt_fast.training.options import TrainingOptions

JSON, MODEL = "depths.json", ".part-model"  # in the output; the second while a depth is measured
# Arguments of `transfer` that the figures do not depend on, and the one that a sweep changes.
NO_SETTINGS = ("output", "n_layers", "resume", "checkpoint_every", "track")


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
    """What a folder of depths has, as in its depths.json.

    Attributes:
        original, initialised: bits per byte of the original model, and with the new tokenizer before training.
        depths: one entry for each depth that was measured, by layer.
        settings: what all depths were measured with: arguments of `transfer`, and the version.
    """

    original: float
    initialised: float
    depths: list[Depth]
    settings: dict


def default_depths(depth: int) -> list[int]:
    """Sixths of a model's depth, in whole layers."""
    return sorted({max(1, round(depth * sixth / 6)) for sixth in range(1, 7)})


@checked
def sweep_layers(
    model: str | Path,
    tokenizer: str | Path,
    data: str | Path,
    output: str | Path,
    eval_data: str | Path,
    *,
    depths: Iterable[int] | None = None,
    on_depth: Callable[[Depth], None] = lambda depth: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    **options,
) -> Sweep:
    """Run `transfer` at several depths, each in a process of its own, and measure quality, time and memory.

    The processes are new ones and do not run the script that calls this, so it needs no `if __name__ == "__main__"`;
    they end with the process that called.

    Args:
        model, tokenizer, data, eval_data: as in `transfer`; the held-out text is needed here. Paths and names only.
        output: folder to write: a new or empty one, or that of a sweep with the same settings, whose depths are not
            measured again. It gets depths.json and depths.png, anew after each depth, so that an error later on leaves
            what was measured; the models are not kept.
        depths: target layers to try; sixths of the model's depth if None.
        on_depth: called with the result of each of `depths`, also of one that was measured before.
        on_stage: called with the depth as its work begins.
        **options: other arguments of `transfer`, but for `n_layers`. Its other callbacks are called in this process. An
            `init` that is a function may be one of the calling script, or a lambda; it is pickled with dill.

    Raises:
        FileExistsError: `output` has something in it that is not a sweep's.
        ValueError: several processes that a launcher started; a depth that the model does not have, or `output` was
            measured with other settings. What `transfer` raises.
        TypeError: an argument that `transfer` does not have, or that cannot be given to another process.
        RuntimeError: the process of a transfer was killed.
        ImportError: matplotlib is missing.
    """
    if options.get("healing") is not None:
        raise ValueError("heal: wanted none with a sweep over layers, which compares the training of rows alone")
    check_alone("layer", "a sweep")
    figure_class()  # before hours of work
    output = Path(output)
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_")}
    arguments = {"model": model, "tokenizer": tokenizer, "data": data, "eval_data": eval_data, **options}
    arguments["completions"] = 0  # nobody reads those of each depth
    arguments.setdefault("seed", 0)
    settings = _settings(arguments)
    done = _measured(output, settings)
    hub = {name: options.get(name, False) for name in ("trust_remote_code", "allow_pickle")}
    teacher = Teacher(model, **hub)
    depths = default_depths(teacher.depth) if depths is None else list(depths)
    if not depths:
        raise ValueError("depths: wanted at least one layer, got none")
    for depth in depths:
        if not 1 <= depth <= teacher.depth:
            raise ValueError(f"depths: wanted layers from 1 to {teacher.depth} for this model, got {depth}")

    def run(n_layers: int, callbacks: dict[str, Callable], **changed):
        with _model_folder(output) as folder:
            return transfer_apart(arguments | {"n_layers": n_layers, "output": folder} | changed, callbacks)

    if done is None:
        on_stage("before training")
        one_step = replace(options.get("training") or TrainingOptions(), steps=1, warmup_steps=0, decay_steps=0)
        start = run(depths[0], {}, training=one_step).evaluations
        done = Sweep(start["original"].bits_per_byte, start["initialised"].bits_per_byte, [], settings)
    measured = {depth.n_layers: depth for depth in done.depths}
    for n_layers in depths:
        if n_layers not in measured:
            on_stage(f"layer {n_layers} of {teacher.depth}")
            result = run(n_layers, callbacks)
            bits = result.evaluations["trained"].bits_per_byte
            measured[n_layers] = Depth(n_layers, bits, result.progress.seconds, result.training_memory)
            done = replace(done, depths=[measured[n] for n in sorted(measured)])
            _write(done, output)
        on_depth(measured[n_layers])
    return done


def _settings(arguments: dict) -> dict:
    """All that the figures depend on, defaults included, as JSON has it; a function counts by its name."""

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Integral | Real):  # NumPy's
            return int(value) if isinstance(value, Integral) else float(value)
        if callable(value):
            return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        raise TypeError(f"arguments of a sweep: wanted plain values, paths and functions, got {value!r}")

    bound = inspect.signature(transfer).bind(output=None, **arguments)
    bound.apply_defaults()
    used = {x: value for x, value in bound.arguments.items() if x not in NO_SETTINGS and not x.startswith("on_")}
    training = asdict(used.pop("training") or TrainingOptions())
    used |= {f"training.{name}": value for name, value in training.items()}
    used["version"] = own_version()
    return json.loads(json.dumps(used, default=plain))


def _measured(folder: Path, settings: dict) -> Sweep | None:
    """What a folder already has; None if it is new or empty.

    Raises:
        FileExistsError: it has something else.
        ValueError: it was measured with other settings.
    """
    file = folder / JSON
    if (folder / MODEL).exists():
        shutil.rmtree(folder / MODEL)  # of a sweep that was killed
    if not file.exists():
        Run(folder).check_free(resume=False)
        return None
    with damaged_files(file, "output", by="a sweep"):
        values = json.loads(file.read_text(encoding="utf-8"))
        depths = [made_of(Depth, depth) for depth in values["depths"]]
        found = made_of(Sweep, values | {"depths": depths})
    before = found.settings
    other = [
        f"{name} {before.get(name)!r} there, {settings.get(name)!r} here"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if other:
        raise ValueError(f"output: {str(file)!r} was measured with other settings: {'; '.join(other)}")
    return found


@contextmanager
def _model_folder(output: Path):
    """A place for a model that is measured, not kept; an output with nothing in it vanishes too."""
    folder = output / MODEL
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _write(outcome: Sweep, folder: Path) -> None:
    """Both files, each whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(outcome, folder / "depths.png")
    write_text(folder / JSON, json.dumps(asdict(outcome), indent=1) + "\n")


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
    save(figure, path)
