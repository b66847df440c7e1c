"""TensorBoard, Weights & Biases and Trackio, through accelerate."""

import contextlib
import secrets
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matt_fast.support.installing import NAME, packages_line

if TYPE_CHECKING:  # the command line checks `track` before it takes the time to import accelerate
    from accelerate import Accelerator

TRACKERS = ("tensorboard", "wandb", "trackio")  # each is the name of its package, too


def trackers_for(track: str | None) -> list[str]:
    """The trackers in `track`: one or more of TRACKERS, joined by ","; none for None.

    Raises:
        ValueError: an unknown name, or one that is given twice.
        ImportError: the package of a tracker is missing.
    """
    if track is None:
        return []
    names = [name.strip() for name in track.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"track: wanted one or more of {', '.join(TRACKERS)}, joined by ','; got {track!r}")
        if find_spec(name) is None:
            raise ImportError(f"track: {name!r} needs a package that is not installed: {packages_line(name)}")
    if len(set(names)) < len(names):
        raise ValueError(f"track: wanted each name once, got {track!r}")
    return names


def log_in(track: str | None) -> None:
    """Let wandb look for a login, or ask for one, before there is any work that would be lost. For the main process.

    Raises:
        ValueError: there is none, and no terminal to ask at.
    """
    if "wandb" not in trackers_for(track):
        return
    import wandb

    try:
        with contextlib.redirect_stdout(sys.stderr):
            wandb.login()
    except Exception as error:  # of whatever kind its package raises
        raise ValueError(f"track: wanted a login at wandb, or WANDB_MODE=offline, got none: {error}") from error


def accelerator_options(track: str | None, folder: Path) -> dict[str, Any]:
    """What `Accelerator` takes for `start_trackers` to start these trackers; TensorBoard writes in `folder`.

    Raises what `trackers_for` does.
    """
    from accelerate.utils import ProjectConfiguration

    names = trackers_for(track)
    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard"))
    return {"log_with": names, "project_config": places} if names else {}


def start_trackers(accelerator: "Accelerator", folder: Path, name: str, config: dict[str, Any], step: int = 0) -> None:
    """Start the accelerator's trackers, or go on with those that wrote into `folder` before. For the main process.

    Args:
        accelerator: made with `accelerator_options`.
        folder: of the run; it keeps the run's id at the trackers, and what wandb and TensorBoard write.
        name: of the run.
        config: settings of the run to show; groups in it may be nested.
        step: the last step that is done; TensorBoard forgets what it has of later ones.

    Raises what the trackers' packages do, where they want a login for example.
    """
    if not accelerator.log_with:
        return
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "tracker_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8")
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"dir": str(folder), "name": name, "id": run_id, "resume": "allow"},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
    }
    with contextlib.redirect_stdout(sys.stderr):  # what they say is no part of what a command prints
        accelerator.init_trackers(NAME, init_kwargs=options)
        for tracker in accelerator.trackers:
            if step == 0 or tracker.name != "tensorboard":  # which makes a further run of each configuration
                tracker.store_init_configuration(_flat(config))


def log_to_trackers(accelerator: "Accelerator", values: dict[str, float], step: int, known: int = 0) -> None:
    """Tell all trackers. One that fails is named in a warning and told no more: training goes on.

    Args:
        known: the last step that they were told before the run was stopped. TensorBoard, which forgot those that are
            done again, is told again; the others are not, since they would have two values for a step.
    """
    for tracker in list(accelerator.trackers):
        if step <= known and tracker.name != "tensorboard":
            continue
        try:
            tracker.log(values, step=step)
        except Exception as error:  # of whatever kind its package raises
            warnings.warn(f"track: {tracker.name} failed at step {step} and gets no more: {error!r}", stacklevel=3)
            accelerator.trackers.remove(tracker)


def finish_trackers(accelerator: "Accelerator") -> None:
    """End the trackers; `Accelerator.end_training` would end the process group, too."""
    for tracker in accelerator.trackers:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                tracker.finish()
        except Exception as error:
            warnings.warn(f"track: {tracker.name} failed at its end: {error!r}", stacklevel=3)
    accelerator.trackers.clear()


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a kind that every tracker shows, the names of nested ones joined by a point."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str | None) else str(value)
    return found
