"""Training on disk: everything that the next step depends on, so that a run goes on as if it had not stopped."""

import contextlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from matt_fast.data.positions import Deal, Position, deal_anew
from matt_fast.support.checks import check_content, made_of
from matt_fast.support.files import wait_to_see, whole_folder, write_text
from matt_fast.training.state import Progress, TrainingState, joined

CHECKPOINTS_KEPT = 2
TENSORS, NUMBERS = "state.safetensors", "state.json"
POSITION = ("epoch", "before", "item", "group", "chunk", "sharded", "read")
CONTENT = {  # of NUMBERS
    "progress": dict,
    "counts": list[dict],
    "positions": list[dict],
    "deal": int,
}
COUNTS = {"tokens": int, "skipped": dict[str, int]}
UNREADABLE = (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


class Checkpoints:
    """A folder of checkpoints, the last CHECKPOINTS_KEPT of them.

    Each is a folder `step-N` with `state.safetensors` (rows, layers, moments, counts, random state, rows that packing
    was filling) and `state.json` (progress, the place in the data of each process, and what else was given).

    Args:
        folder: where they are; made with the first one.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, state: TrainingState, accelerator: Accelerator, more: dict | None = None) -> None:
        """Write the state behind the step that is done; all processes call it, the main one writes.

        Args:
            state: of this process.
            accelerator: of the run.
            more: JSON of the caller, handed back by `read`.
        """
        positions, counts = zip(*gather_object([(state.position, state.progress.counts)]), strict=True)
        seen = accelerator.reduce(state.seen.to(accelerator.device), reduction="sum").cpu()
        if not accelerator.is_main_process:
            return
        tensors = {"seen": seen, "occurred": state.occurred, **random_states(accelerator.device)}
        for number, (table, optimizer) in enumerate(zip(state.student.tables, state.optimizers, strict=True)):
            tensors[f"{number}.rows"] = table.trainable
            tensors[f"{number}.first_moment"] = optimizer.first_moment
            tensors[f"{number}.second_moment"] = optimizer.second_moment
            tensors[f"{number}.updates"] = torch.as_tensor(optimizer.updates)
        if state.pending is not None:
            tensors["pending"] = state.pending
        if state.layers is not None:
            tensors |= state.layers.state()
        for process, position in enumerate(positions):
            tensors[f"position.{process}.open_shapes"] = torch.from_numpy(position.open_shapes)
            tensors[f"position.{process}.open_numbers"] = torch.from_numpy(position.open_numbers)
        deal = positions[0].deal  # one for all
        tensors |= {"deal.behind": torch.from_numpy(deal.behind), "deal.begun": torch.from_numpy(deal.begun)}
        progress = asdict(state.progress)
        tensors["losses"] = torch.tensor(progress.pop("losses"), dtype=torch.float64)
        numbers = {
            "progress": progress,
            "counts": counts,
            "positions": [{name: getattr(position, name) for name in POSITION} for position in positions],
            "deal": deal.first,
            "more": more or {},
        }
        with whole_folder(self.folder / f"step-{state.progress.step:09}") as part:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / TENSORS)
            write_text(part / NUMBERS, json.dumps(numbers))
        self.remove_from(state.progress.step + 1)  # what could not be read when the run went on
        for old in self.steps()[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)  # tried again with the next one: no reason to end a run

    def steps(self) -> list[Path]:
        """The checkpoints that are there whole, the oldest first."""
        return sorted(self.folder.glob("step-*"))

    def notes(self) -> list[dict]:
        """What `write` was given as `more` by each that can be read."""
        found = []
        for folder in self.steps():
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["more"])
        return found

    def remove_from(self, step: int) -> None:
        """Remove the checkpoints behind this step and later ones."""
        for folder in self.steps():
            if int(folder.name.removeprefix("step-")) >= step:
                shutil.rmtree(folder)

    def read(
        self, state: TrainingState, accelerator: Accelerator, more: Mapping[str, Any] = MappingProxyType({})
    ) -> dict | None:
        """Bring `state`, which is at its beginning, to that of the last checkpoint that can be read; all processes.

        Another number of processes goes on with what is not behind, see `deal_anew`. A checkpoint that cannot be read
        is named in a warning.

        Args:
            state: of this process.
            accelerator: of the run.
            more: what must be in what `write` was given as `more`, see `check_content`.

        Returns:
            What `write` was given as `more`; None where there is no checkpoint.

        Raises:
            ValueError: none of those there can be read, or not the one that the main process goes on from.
        """
        found, last, faults = None, None, []
        for folder in reversed(self.steps()):
            try:
                found, last = _read(folder, state, accelerator, more), folder.name
                break
            except torch.OutOfMemoryError:
                raise
            except UNREADABLE as error:
                faults.append(f"{folder}: {error}")
        if faults and last is None:
            raise ValueError("no checkpoint can be read; delete them to begin training anew: " + "; ".join(faults))
        (chosen,) = broadcast_object_list([last])
        if chosen != last:  # this process sees others: a network file system shows late what another machine wrote
            try:
                wait_to_see(self.folder / str(chosen))
                found = _read(self.folder / str(chosen), state, accelerator, more)
            except UNREADABLE as error:
                raise ValueError(
                    f"checkpoints: wanted {chosen} in {str(self.folder)!r}, from which the main process goes on, but "
                    f"process {accelerator.process_index} cannot read it: {error}"
                ) from error
        for fault in faults if accelerator.is_main_process else ():
            warnings.warn(f"no checkpoint that can be read, {fault}; the run goes on from {chosen}", stacklevel=2)
        return found


def _read(folder: Path, state: TrainingState, accelerator: Accelerator, more: Mapping[str, Any]) -> dict:
    tensors = load_file(folder / TENSORS)
    numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    check_content(NUMBERS, numbers, CONTENT | {"more": more or dict})
    for counts in numbers["counts"]:
        check_content("counts", counts, COUNTS)
    _restore(state, tensors, numbers, accelerator)
    return dict(numbers["more"])


def _restore(state: TrainingState, tensors: dict, numbers: dict, accelerator: Accelerator) -> None:
    for number, (table, optimizer) in enumerate(zip(state.student.tables, state.optimizers, strict=True)):
        table.trainable.copy_(tensors[f"{number}.rows"])
        optimizer.first_moment.copy_(tensors[f"{number}.first_moment"])
        optimizer.second_moment.copy_(tensors[f"{number}.second_moment"])
        updates = tensors[f"{number}.updates"]
        if optimizer.dense:
            optimizer.updates = int(updates)
        else:
            optimizer.updates.copy_(updates)
    if state.pending is not None:
        state.pending.copy_(tensors["pending"])
    if state.layers is not None:
        state.layers.restore(tensors)
    if state.student.head is not None:
        table = state.student.tables[-1]
        state.student.head.update(table.trainable_ids, table.trainable)
    if accelerator.is_main_process:  # it has what all of them counted
        state.seen.copy_(tensors["seen"])
    state.occurred.copy_(tensors["occurred"])
    mine = joined(numbers["counts"][accelerator.process_index :: accelerator.num_processes])
    state.progress = made_of(Progress, numbers["progress"] | mine | {"losses": tensors["losses"].tolist()})
    positions = _positions(tensors, numbers)
    if len(positions) != accelerator.num_processes:
        positions = deal_anew(positions, accelerator.num_processes)
    state.position = positions[accelerator.process_index]
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], accelerator.device)


def _positions(tensors: dict, numbers: dict) -> list[Position]:
    """Of each process that wrote the checkpoint."""
    behind, begun = (tensors[f"deal.{name}"].numpy().copy() for name in ("behind", "begun"))
    deal, found = Deal(numbers["deal"], behind, begun), []
    for process, place in enumerate(numbers["positions"]):
        names = "open_shapes", "open_numbers"
        arrays = {name: tensors[f"position.{process}.{name}"].numpy().copy() for name in names}
        found.append(made_of(Position, place | arrays | {"deal": deal}))
    return found


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states
