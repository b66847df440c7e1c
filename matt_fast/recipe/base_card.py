"""What a model's own card and files tell of it, for the card of the model that is made of it."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from matt_fast.support.printable import printable

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CACHED = "models--"  # of the hub's cache: models--ORG--NAME/snapshots/REVISION
LIBRARIES = ("transformers", "sentence-transformers")  # that load a result like the original
FORMAT = "For transformers 5 or newer: older ones may pass over parts of config.json without an error."
LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """A model that another is made of.

    Attributes:
        name: on the hub; None where nothing says so.
        license: what its card says: "license", and "license_name" and "license_link" of one of its own; {} without.
        languages: likewise.
        pipeline_tag: likewise; None without.
        library: that loads it.
    """

    name: str | None = None
    license: tuple[tuple[str, str], ...] = ()
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    library: str = LIBRARIES[0]


def read_base(model: str | Path, on_message: Callable[[str], None] = lambda text: None) -> Base:
    """What the card of a model tells: of a folder its README.md, of a hub name the card there.

    Args:
        model: folder or hub name.
        on_message: told what cannot be read and is left out.
    """
    place = Path(model)
    here = place.exists()
    try:
        data = _own_card(place) if here else ModelCard.load(str(model)).data.to_dict()
    except Exception as error:  # of many kinds: no network, no card, damaged metadata
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        on_message(f"README.md: no licence, as the card of {str(model)!r} cannot be read ({line})")
        data = {}
    name = _name_of_folder(place, data) if here else str(model)
    license = tuple((key, str(data[key])) for key in LICENSE if isinstance(data.get(key), str))
    languages = data.get("language") or ()
    languages = (languages,) if isinstance(languages, str) else tuple(x for x in languages if isinstance(x, str))
    tag = data.get("pipeline_tag")
    library = next((x for x in LIBRARIES if x == data.get("library_name")), LIBRARIES[0])
    return Base(name, license, languages, tag if isinstance(tag, str) else None, library)


def base_metadata(base: Base, pipeline_tag: str | None, **more) -> ModelCardData:
    """The metadata of the card of a model that is made of `base`: where it comes from, its licence, what it is for."""
    return ModelCardData(
        base_model=None if base.name is None else printable(base.name),
        library_name=base.library,
        pipeline_tag=pipeline_tag,
        tags=["tokenizer-transfer", "matt-fast"],
        **{key: printable(value) for key, value in base.license},
        **more,
    )


def is_hub_name(text: object) -> bool:
    """Whether a text has the shape of a name on the hub, with the name of its owner."""
    if not isinstance(text, str) or not HUB_NAME.fullmatch(text) or Path(text).exists():
        return False
    try:
        validate_repo_id(text)
    except ValueError:
        return False
    return True


def _own_card(folder: Path) -> dict[str, Any]:
    path = folder / "README.md"
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}


def _name_of_folder(folder: Path, data: dict[str, Any]) -> str | None:
    """The hub name of a folder: of the hub's cache, else what its card or its configuration says it is made of."""
    for part in folder.resolve().parts:
        if part.startswith(CACHED):
            return part.removeprefix(CACHED).replace("--", "/")
    base = data.get("base_model")
    names = [*base] if isinstance(base, list) else [base]
    with suppress(OSError, ValueError, AttributeError):
        names.append(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path"))
    return next((x for x in names if is_hub_name(x)), None)
