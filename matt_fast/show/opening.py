"""The models that pictures are made of, and where the rows of a finished transfer began."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from matt_fast.initializers import METHODS
from matt_fast.model.checkpoint_files import check_weights
from matt_fast.model.teacher import Teacher


@dataclass(frozen=True)
class Finished:
    """What the folder of a finished transfer tells of how it was made.

    Attributes:
        model: the original model, as the run was told; None if the folder does not say.
        layer: the target layer; None likewise.
        init, seed: where rows began; the first is None where that is a method whose rows cannot be made again without
            the run's data, or where the folder does not say.
        named: the method's name, for people.
    """

    model: str | None = None
    layer: int | None = None
    init: str | None = None
    seed: int = 0
    named: str = "unknown"


def read_run(folder: Path) -> Finished:
    """What `run/` in the output of a transfer says; nothing where there is none.

    Raises:
        ValueError: a file there is damaged.
    """
    run = folder / "run"
    try:
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))["settings"]
        model = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))["model"]
        layer = json.loads((run / "result.json").read_text(encoding="utf-8"))["n_layers"]
        named = settings["init"] + (f", {settings['init_head']} head" if settings["init_head"] != "same" else "")
        return Finished(model, layer, settings["init"] if named in METHODS else None, settings["seed"], named)
    except FileNotFoundError:
        return Finished()
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"folder: wanted the files of a finished run in {str(run)!r}, got damaged ones") from error


def open_model(
    place: str | Path, argument: str, n_layers: int | None, **hub_options
) -> tuple[Teacher, PreTrainedModel]:
    """A model in float32 on the CPU, with only so many of its lower layers.

    Raises:
        ValueError, OSError: it cannot be loaded; the argument is named.
    """
    source = Teacher(place, argument=argument, **hub_options)
    check_weights(source)
    if n_layers is not None and not 1 <= n_layers <= source.depth:
        raise ValueError(f"layer: wanted 1 to {source.depth} for {str(place)!r}, got {n_layers}")
    return source, source.load(torch.float32, max(1, round(source.depth / 3)) if n_layers is None else n_layers)


def open_whole(place: str | Path, argument: str, **hub_options) -> tuple[Teacher, PreTrainedModel]:
    """A causal language model in float32 on the CPU, all of it.

    Raises:
        ValueError, OSError: it cannot be loaded, has no head or is a masked one; the argument is named.
    """
    source = Teacher(place, argument=argument, **hub_options)
    check_weights(source)
    source.check_language_model("show loss")
    if source.masked:
        raise ValueError(f"{argument}: wanted a causal language model, got the masked one {str(place)!r}")
    return source, source.load(torch.float32)
