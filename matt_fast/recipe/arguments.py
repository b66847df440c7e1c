"""What can be told of a transfer's arguments by their values, and by the first rows of local texts.

Imports nothing slow.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matt_fast.alignment.mapping import check_map
from matt_fast.data.parallel import check_pairs_file
from matt_fast.data.places import MANIFEST, is_url
from matt_fast.data.reading import check_texts
from matt_fast.initializers.choices import FROM_DONOR, FROM_PAIRS, FROM_TEXTS, INIT_HEADS, INITS
from matt_fast.model.folders import check_model_place, check_tokenizer_place
from matt_fast.runs.folder import Run
from matt_fast.support.checks import (
    LENGTH,
    MANY,
    ROWS,
    SEEDS,
    check_choice,
    check_location,
    check_outside,
    check_positive,
    check_range,
)
from matt_fast.support.every import Every
from matt_fast.support.files import check_writable
from matt_fast.training.trackers import TRACKERS

EXECUTORS = ("local", "slurm", "ray")  # of datatrove
SHARDS = 100_000  # at most: names count so far
WORKERS = 256
COMPLETIONS = 1000
PRECISIONS = ("auto", "no", "bf16")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")  # what the hub knows
PLACES = {  # of arguments that may be folders or names of the hub
    "model": check_model_place,
    "tokenizer": check_tokenizer_place,
    "teacher": check_model_place,
    "donor": check_model_place,
}
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu|mlu|musa)(:\d+)?")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check what is there of a transfer's arguments, by name; objects given in Python are left alone.

    Raises:
        ValueError: a value that no transfer takes, or a text that cannot be read; the message names it.
        OSError: a path where nothing is, or an output that has something in it or cannot be written.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    given |= _named_texts(given)
    for name, check in PLACES.items():
        if isinstance(given.get(name), str | Path):
            check(given[name], name)
    if isinstance(given.get("init"), str | Path):
        _check_init(given["init"])
    for name in ("data", *(x for x in given if x.startswith("eval_data"))):
        if isinstance(given.get(name), str | Path):
            check_texts(name, given[name], given.get("text_field", "text"))
    check_map(given.get("map_tokens", ()))
    for code in given.get("language", ()):
        if not isinstance(code, str) or not LANGUAGE.fullmatch(code):
            raise ValueError(f"language: wanted codes such as 'uk', 'deu' or 'code', got {code!r}")
    if "parallel" in given:
        check_pairs_file(given["parallel"])
    resume = given.get("resume", False)
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume: wanted True, False or 'auto', got {resume!r}")
    if "output" in given:
        Run(given["output"]).check_free(resume)
        check_writable("output", given["output"])
        check_output_apart(given["output"], given)
    for name, choices in (("init_head", INIT_HEADS), ("precision", PRECISIONS)):
        if name in given:
            check_choice(name, given[name], choices)
    most = {"max_length": LENGTH, "batch_size": ROWS}
    for name in ("n_layers", "max_length", "batch_size", "eval_pieces", "patience", "per_token", "snippets", "omp_k"):
        check_range(name, given.get(name), 1, most.get(name, MANY))
    check_range("rehearse", given.get("rehearse"), 0, MANY)
    check_range("seed", given.get("seed"), 0, SEEDS)
    check_range("completions", given.get("completions"), 0, COMPLETIONS)
    check_range("data_workers", given.get("data_workers"), 0, WORKERS)
    check_positive("epochs", given.get("epochs"), MANY)
    for name in ("init", "init_head"):
        if given.get(name) in FROM_DONOR and "donor" not in given:
            raise ValueError(f"donor: wanted a model with the new vocabulary for {name} {given[name]!r}, got none")
        if given.get(name) in FROM_PAIRS and "parallel" not in given:
            raise ValueError(f"parallel: wanted pairs of texts and translations for {name} {given[name]!r}, got none")
    if "prepared" in given:
        _check_prepared(given)
    if "data" not in given and "snippets" in arguments:  # all of a transfer's arguments are there
        _check_without_data(given)
    _check_watching(given)


def _check_init(init: str | Path) -> None:
    """A name of `INITS`, or a place; what is here has to be a model, or a .safetensors file."""
    check_location("init", init, (".safetensors",))
    text, place = str(init), Path(init)
    if text in INITS or (place.is_file() and place.suffix == ".safetensors"):
        return
    if not place.exists() and "/" not in text:
        raise ValueError(
            f"init: wanted {', '.join(INITS)}, or ready rows: a model folder, a .safetensors file or OWNER/NAME on the "
            f"hub; got {text!r}"
        )
    check_model_place(init, "init")


def check_output_apart(output: str | Path, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if the output of a transfer would lie in one of its folders of texts."""
    given = {"data": arguments.get("data"), "eval_data": arguments.get("eval_data"), **_named_texts(arguments)}
    for name, place in given.items():
        if isinstance(place, str | Path):
            check_outside("output", output, name, place)


def check_prepare(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of `prepare`, by name.

    Raises:
        ValueError: a value that it does not take; the message names it.
        OSError: a path where nothing is, an output that is a file, or one inside the data.
    """
    for name in ("model", "tokenizer", "teacher"):
        if isinstance(arguments[name], str | Path):
            PLACES[name](arguments[name], name)
    check_texts("data", arguments["data"], arguments["text_field"])
    check_choice("executor", arguments["executor"], EXECUTORS)
    for name, most in (("max_length", LENGTH), ("shards", SHARDS), ("workers", MANY)):
        check_range(name, arguments[name], 1, most)
    if arguments["executor_options"] and arguments["executor"] == "local":
        raise ValueError(f"executor_options: wanted none for 'local', got {', '.join(arguments['executor_options'])}")
    output = Path(arguments["output"]).absolute()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: wanted a folder, but {str(output)!r} is a file")
    check_outside("output", output, "data", arguments["data"])
    check_writable("output", output)


def _check_without_data(given: Mapping[str, Any]) -> None:
    """What can be done without a text: only what snippets and prepared chunks serve for."""
    if "snippets" not in given and "prepared" not in given:
        raise ValueError("data: wanted text to train on, got none; with snippets the teacher writes some")
    for name in ("init", "init_head"):
        if given.get(name) in (*FROM_TEXTS, "boundary"):
            raise ValueError(f"data: wanted text for {name} {given[name]!r}, got none")


def _check_prepared(given: Mapping[str, Any]) -> None:
    """What goes together with prepared chunks."""
    if "data_cache" in given:
        raise ValueError("data_cache: wanted none beside prepared, which has the chunks, got one")
    if not is_url(given["prepared"]):
        if not Path(given["prepared"], MANIFEST).is_file():
            raise FileNotFoundError(
                f"prepared: wanted a folder of `matt-fast prepare` that is finished, or a URL, got "
                f"{str(given['prepared'])!r}, which has no {MANIFEST}"
            )
    else:
        for name in ("epochs", "per_token", "snippets"):
            if given.get(name):
                raise ValueError(
                    f"{name}: wanted prepared chunks in a local folder for it, got those at {str(given['prepared'])!r}"
                )


def _named_texts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The places of held-out texts that have names, by what errors call them."""
    texts = given.get("eval_data")
    if not isinstance(texts, Mapping):
        return {}
    if not texts or not all(isinstance(name, str) and name.strip() for name in texts):
        raise ValueError(f"eval_data: wanted texts by name, got {dict(texts)!r}")
    return {f"eval_data {name}": place for name, place in texts.items()}


def check_device(device: str | None) -> None:
    """Raise a ValueError unless `device` is a device's name, or None."""
    if device is not None and not DEVICE.fullmatch(device):
        raise ValueError(f"device: wanted cpu, cuda, cuda:1, mps or the like; got {device!r}")


def _check_watching(given: Mapping[str, Any]) -> None:
    """What is done while a transfer runs: checkpoints, validation, trackers."""
    check_device(given.get("device"))
    for name in ("checkpoint_every", "validate_every"):
        if given.get(name) != "auto" or name == "validate_every":
            Every.parse(name, given.get(name))
    for name, needs in (("validate_every", "eval_data"), ("patience", "validate_every")):
        if name in given and needs not in given:
            raise ValueError(f"{name}: wanted {needs} with it, got none")
    for tracker in given.get("track", "").split(",") if "track" in given else ():
        check_choice("track", tracker.strip(), TRACKERS)
