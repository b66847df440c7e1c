"""What a folder given as a model or tokenizer holds, told by its files: refused with its name if it is none."""

import json
import os
from pathlib import Path

from matt_fast.support.checks import check_location

CONFIG, ADAPTER = "config.json", "adapter_config.json"
OF_TOKENIZER = ("*token*", "*vocab*", "merges.txt", "*.model", "*.gguf")  # files of which one is there at least


def check_model_place(model: str | Path, argument: str) -> None:
    """Look at what is at `model` before transformers does, which would ask the hub or name something else.

    Args:
        model: folder or hub name.
        argument: what errors call it.

    Raises:
        OSError: it can only be a path, and nothing is there, or what is there cannot be read.
        ValueError: a file, weights in GGUF, a PEFT adapter, or a folder without a configuration.
    """
    check_location(argument, model, (".gguf",))
    place = Path(model)
    if not place.exists():
        return
    _check_readable(place, argument)
    gguf = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    if place.is_file() and not gguf:
        raise ValueError(
            f"{argument}: wanted a folder with {CONFIG} and weights, or a name of the hub; got a file, {_quoted(place)}"
        )
    if (place / ADAPTER).is_file():
        raise ValueError(f"{argument}: wanted a whole model, got in {_quoted(place)} {_adapter(place)}")
    if (place / CONFIG).is_file():
        return
    if gguf:
        raise ValueError(
            f"{argument}: wanted weights in .safetensors, got {_quoted(gguf[0])}, GGUF for llama.cpp. Take the model "
            "that it was made of, or convert it: model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), "
            "del model.config.quantization_config, plain = type(model)(model.config), "
            "plain.load_state_dict(model.state_dict()), plain.save_pretrained(new_folder)"
        )
    raise ValueError(
        f"{argument}: {_quoted(place)} could not be loaded as a model: wanted {CONFIG} in it, got {contents(place)}"
        + _further_in(place, CONFIG)
    )


def check_tokenizer_place(tokenizer: str | Path, argument: str) -> None:
    """Look at what is at `tokenizer`, before anything is loaded.

    Args:
        tokenizer: folder or hub name of a model or tokenizer, or a tokenizer.json.
        argument: what errors call it.

    Raises:
        OSError: it can only be a path, and nothing is there, or what is there cannot be read.
        ValueError: another file, or a folder without any of a tokenizer.
    """
    check_location(argument, tokenizer, (".txt", ".json", ".gguf"))
    place = Path(tokenizer)
    if place.exists():
        _check_readable(place, argument)
    if place.is_file() and place.suffix.lower() not in (".json", ".gguf"):
        raise ValueError(
            f"{argument}: wanted a folder with tokenizer.json, that file, or a name of the hub; got {_quoted(place)}"
        )
    if place.is_dir() and not any(any(place.glob(name)) for name in OF_TOKENIZER):
        raise ValueError(
            f"{argument}: {_quoted(place)} could not be loaded as a tokenizer: wanted tokenizer.json in it, got "
            f"{contents(place)}" + _further_in(place, "tokenizer.json")
        )


def _check_readable(place: Path, argument: str) -> None:
    """Raise a PermissionError if a file, or a folder or a file in it, cannot be read: libraries say it is not there."""
    rights = os.R_OK | os.X_OK if place.is_dir() else os.R_OK
    closed = [] if os.access(place, rights) else [place]
    if place.is_dir() and not closed:
        closed = [x for x in sorted(place.iterdir()) if x.is_file() and not os.access(x, os.R_OK)]
    if closed:
        raise PermissionError(f"{argument}: wanted what can be read, got {_quoted(closed[0])}: permission denied")


def contents(folder: Path) -> str:
    """The names of a folder's first files, for an error."""
    names = sorted(x.name for x in folder.iterdir())
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "") if names else "nothing"


def _further_in(folder: Path, name: str) -> str:
    """Where it is instead, for an error: folders of a trainer's checkpoints, or of the hub's cache."""
    found = sorted(file for depth in ("*", "snapshots/*") for file in folder.glob(f"{depth}/{name}"))
    places = ", ".join(_quoted(file.parent) for file in found[:3])
    return f"; {places} {'has' if len(found) == 1 else 'have'} it" if found else ""


def _adapter(place: Path) -> str:
    try:
        settings = json.loads((place / ADAPTER).read_text(encoding="utf-8"))
        base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type", "PEFT")
    except (ValueError, AttributeError):
        base, kind = None, "PEFT"
    beside = ", beside a model; take one of them out of the folder" if (place / CONFIG).is_file() else ""
    return (
        f"a {kind} adapter of {base!r}{beside}. Merge it first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
    )


def _quoted(place: Path) -> str:
    return repr(str(place))
