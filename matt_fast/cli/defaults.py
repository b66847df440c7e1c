"""Options of a command that come from a file: --config and --resume."""

import inspect
import typing
from pathlib import Path

import typer

from matt_fast.cli.output import clear_errors
from matt_fast.recipe.config import load_config
from matt_fast.recipe.recipes import recipe
from matt_fast.runs.folder import Run

NOT_IN_FILES = ("config", "resume", "recipe", "help", "push_to_hub", "public", "yes")
SEVERAL = ("eval_data", "map_tokens", "language")  # one value or a list
AUTO = Path("auto")  # of --resume: go on with the run in --output where there is one, else begin
NUMBER_OR_WORD = ("layer", "checkpoint_every", "validate_every")


def read_recipe(context: typer.Context, name: str | None) -> str | None:
    """Callback of --recipe: its options become defaults, under those of a file and of a resumed run."""
    if name is not None and not context.resilient_parsing:
        with clear_errors():
            words = {key: str(x) if key in NUMBER_OR_WORD else x for key, x in recipe(name).items()}
            context.default_map = {**words, **(context.default_map or {})}
    return name


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: its options become defaults, over those of a resumed run."""
    if path is not None and not context.resilient_parsing:
        with clear_errors():
            context.default_map = {**(context.default_map or {}), **_load(context, path)}
    return path


def read_run(context: typer.Context, folder: Path | None) -> Path | None:
    """Callback of --resume: the run's own options become defaults, and its folder is the output; not with "auto"."""
    if folder not in (None, AUTO) and not context.resilient_parsing:
        with clear_errors():
            file = Run(folder).path("run.yaml")
            if not file.is_file():
                raise FileNotFoundError(f"resume: wanted the output of a run that was begun, but {file} is not there")
            found = _load(context, file) | {"output": str(folder)}
            context.default_map = found | (context.default_map or {})
    return folder


def _load(context: typer.Context, path: Path) -> dict[str, object]:
    types = typing.get_type_hints(inspect.unwrap(context.command.callback))
    known, other_names = {}, {}
    for option in context.command.params:
        if option.name in types and option.name not in NOT_IN_FILES:
            kind = types[option.name] | int if option.name in NUMBER_OR_WORD else types[option.name]
            parts = [str if part is Path else part for part in typing.get_args(kind) or (kind,)]
            parts = [x for part in parts for x in ((str, list) if typing.get_origin(part) is list else (part,))]
            known[option.name] = typing.Union[tuple(parts)]  # noqa: UP007
            other_names |= {name.lstrip("-").replace("-", "_"): option.name for name in option.opts}
    found = load_config(path, known, other_names)
    found |= {name: [found[name]] for name in SEVERAL if isinstance(found.get(name), str)}
    words = {name: str(found[name]) for name in NUMBER_OR_WORD if found.get(name) is not None}
    return found | words
