"""What a folder given as a model holds, told by its files: refused with its name if it is no language model."""

import json
from pathlib import Path

from matt_fast.support.checks import check_location

CONFIG, ADAPTER = "config.json", "adapter_config.json"


def check_model_place(model: str | Path) -> None:
    """Look at what is at `model` before transformers does, which would ask the hub or name something else.

    Raises:
        FileNotFoundError: it can only be a path, and nothing is there; a folder without a configuration.
        ValueError: a file, weights in GGUF, or a PEFT adapter.
    """
    check_location("model", model, (".gguf",))
    place = Path(model)
    if not place.exists():
        return
    gguf = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    if place.is_file() and not gguf:
        raise ValueError(
            f"model: wanted a folder with {CONFIG} and weights, or a name of the hub; got the file {_quoted(place)}"
        )
    if (place / ADAPTER).is_file():
        raise ValueError(_of_adapter(place))
    if (place / CONFIG).is_file():
        return
    if gguf:
        raise ValueError(
            f"model: wanted weights in .safetensors, got {_quoted(gguf[0])}, GGUF for llama.cpp. Take the model it was "
            "made of, or convert it: model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), "
            "del model.config.quantization_config, plain = type(model)(model.config), "
            "plain.load_state_dict(model.state_dict()), plain.save_pretrained(new_folder)"
        )
    names = sorted(x.name for x in place.iterdir())
    there = ", ".join(names[:5]) + (" …" if len(names) > 5 else "") if names else "nothing"
    raise FileNotFoundError(f"model: wanted a folder with {CONFIG}, got {_quoted(place)}, which has {there}")


def _of_adapter(place: Path) -> str:
    try:
        settings = json.loads((place / ADAPTER).read_text(encoding="utf-8"))
        base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type", "PEFT")
    except (ValueError, AttributeError):
        base, kind = None, "PEFT"
    beside = ", beside a model; take one of them out of the folder" if (place / CONFIG).is_file() else ""
    return (
        f"model: wanted a whole model, got in {_quoted(place)} a {kind} adapter of {base!r}{beside}. Merge it first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
    )


def _quoted(place: Path) -> str:
    return repr(str(place))
