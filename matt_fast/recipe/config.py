"""A transfer's options as a YAML file: what a run writes down, and what --config reads. Imports nothing slow.

The file is read by the rules of YAML 1.2, under which `3e-3` is a number, and `no` and `1:30` are words.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from matt_fast.support.checks import check_type
from matt_fast.training.options import healing_settings

INPUTS = ("model", "tokenizer", "teacher", "data", "prepared", "init", "donor", "parallel", "eval_data")  # may be paths
OUTPUTS = ("output", "data_cache")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")
SCALARS = (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), [*"~nN", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), [*"-+0123456789"]),
    ("float", FLOAT, [*"-+.0123456789"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes words that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, [*"-+.0123456789"])


def resolved_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a transfer by the names that the command line has, so that they give the same run again.

    Args:
        arguments: of `transfer`, by name; `training` is there. Callbacks and `resume` are left out.

    Returns:
        Values that YAML has. Paths are absolute, so that the file serves from anywhere. An object that was given in
        Python (a tokenizer, a function) becomes "<its type>", which no command takes: give that option beside --config.
    """
    config: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "training":
            config |= asdict(value)
            config["max_grad_norm"] = value.max_grad_norm or 0.0
        elif name == "healing":
            config |= healing_settings(value)
        elif name == "n_layers":
            config["layer"] = "third" if value is None else value
        elif name == "eval_data" and isinstance(value, Mapping):
            config[name] = [f"{text}={_plain(name, place)}" for text, place in value.items()]
        elif name != "resume" and not name.startswith("on_"):
            config[name] = _plain(name, value)
    return config


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str | Path) and (name in OUTPUTS or (name in INPUTS and Path(value).exists())):
        return str(Path(value).absolute())
    if isinstance(value, Path):
        return str(value)
    if name in ("map_tokens", "language"):
        return list(value)
    return value if isinstance(value, str | int | float | None) else f"<{type(value).__name__}>"


def dump_config(options: Mapping[str, Any]) -> str:
    """YAML with one line for each option, in their order."""
    return yaml.dump(dict(options), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def load_config(
    path: str | Path, known: Mapping[str, type | UnionType], other_names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Read options from a YAML file.

    Args:
        path: of the file; each key is an option's long name, with dashes or underscores.
        known: the type of each option, by its name with underscores.
        other_names: what else an option may be called there, and its name.

    Returns:
        The values by their names with underscores.

    Raises:
        ValueError: no YAML, no mapping, an unknown option, or one that is given twice. All messages name the file.
        TypeError: a value of another type; the message names the option too.
        OSError: the file cannot be read.
    """
    options: dict[str, Any] = {}
    for key, value in _pairs(Path(path)):
        name = str(key).replace("-", "_")
        name = (other_names or {}).get(name, name)
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{path}: {key}: wanted an option of the command, got an unknown one{hint}")
        if name in options:
            raise ValueError(f"{path}: {key}: wanted each option once, got it twice")
        check_type(f"{path}: {key}", value, known[name])
        options[name] = value
    return options


def _pairs(path: Path) -> list[tuple[Any, Any]]:
    """Keys and values of a file, those given twice too."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:  # an empty file
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}: wanted lines like 'steps: 1000', got {node.id}")
        return [tuple(loader.construct_object(part, deep=True) for part in pair) for pair in node.value]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: wanted YAML, but it cannot be read: {' '.join(str(error).split())}") from error
