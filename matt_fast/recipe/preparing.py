"""Chunks made once, as shards, by the executors of datatrove: on this machine, on a Slurm or on a Ray cluster.

Each task makes the shard of its number; datatrove marks those that are done, so the same command again makes what is
missing. See `data/shards.py` for what lies in the folder.
"""

import hashlib
import inspect
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matt_fast.data.chunks import Side
from matt_fast.data.documents import Texts, read_documents
from matt_fast.data.reading import find_files
from matt_fast.data.shards import (
    MANIFEST,
    SHARDS,
    MadeOf,
    Manifest,
    package_versions,
    records_there,
    shard_name,
    write_shard,
)
from matt_fast.data.stream import PIECE_CHARACTERS
from matt_fast.data.summary import digest_files, hub_revision
from matt_fast.recipe.arguments import check_prepare
from matt_fast.recipe.subject import Subject
from matt_fast.recipe.transfer import job_of
from matt_fast.runs.folder import damaged_files
from matt_fast.support.checks import check_content, checked
from matt_fast.support.files import remove_parts, write_text
from matt_fast.support.installing import install_line, packages_line
from matt_fast.support.locks import locked
from matt_fast.support.texts import bounded_pieces
from matt_fast.support.threads import cores
from matt_fast.support.workers import OrderedPool
from matt_fast.training.options import TrainingOptions

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

ASKED, LOGS = "prepare.json", "logs"
SEED = 0  # of the order of the texts; training shuffles chunks anew in each pass


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` came to.

    Attributes:
        output: the folder.
        shards, made: shards in all, and those that this call made.
        manifest: None where a cluster was given the work, which writes it at the end.
    """

    output: Path
    shards: int
    made: int
    manifest: Manifest | None


@checked
def prepare(
    model: str | Path,
    tokenizer: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    teacher: str | Path | None = None,
    max_length: int = 512,
    split: str = "train",
    text_field: str = "text",
    shards: int = 16,
    workers: int | None = None,
    executor: str = "local",
    executor_options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> PrepareResult:
    """Make the aligned chunks of a text once, as shards that `transfer` takes as `prepared`.

    The same call again goes on with what is not there. Where a source has as many files, or shards of a hub dataset, as
    are wanted here, each task reads its own; otherwise each reads all texts and takes every so many, which is fine for
    some dozens of shards.

    Args:
        model, tokenizer, teacher, max_length: as in `transfer`; chunks are for these alone.
        data, split, text_field: the text, see `read_documents`.
        output: folder to write; every machine that works on it must see it under this name.
        shards: how many; a streamed folder wants one for each training process.
        workers: tasks at a time; all cores of this machine, or as many as the cluster gives, if None.
        executor: "local", "slurm" or "ray".
        executor_options: more arguments of datatrove's executor, such as partition and time of Slurm.
        trust_remote_code: let the model's or tokenizer's repository run code of its own.
        on_stage, on_progress: as in `transfer`.

    Raises:
        FileExistsError: `output` has something else in it, or another process works there.
        ValueError, TypeError: an argument does not fit, or is not what the folder was begun with; text that cannot be
            read.
        ImportError: datatrove, or what its executor needs, is not installed.
        ChildProcessError: a worker was killed.
    """
    given = {"model": model, "tokenizer": tokenizer, "teacher": teacher, "data": data}
    check_prepare(
        given
        | {"output": output, "max_length": max_length, "shards": shards, "workers": workers, "executor": executor}
        | {"executor_options": executor_options, "text_field": text_field}
    )
    output = Path(output).absolute()
    make = _executor(executor, executor_options or {})
    given = {name: _absolute(x) for name, x in given.items()}
    given |= {"max_length": max_length, "split": split, "text_field": text_field}
    given |= {"trust_remote_code": trust_remote_code}
    on_stage("checks")
    step = MakeShard.of(given, output, shards)
    output.mkdir(parents=True, exist_ok=True)
    (output / LOGS).mkdir(exist_ok=True)
    with locked(output / LOGS / "lock"):
        step.begin()
        there = records_there(output, shards)
        for number in set(range(shards)) - there.keys():  # one that was lost is made again
            (output / LOGS / "completions" / f"{number:05}").unlink(missing_ok=True)
        missing = shards - len(there)
        if missing:
            on_stage("shards")
            (output / MANIFEST).unlink(missing_ok=True)
        if missing and executor == "slurm":
            _run_slurm(make, step, workers)
            return PrepareResult(output, shards, 0, None)
        if missing and executor == "ray":
            make([step], tasks=shards, workers=workers or -1, logging_dir=str(output / LOGS)).run()
        elif missing:
            remove_parts(output / SHARDS)
            local = make([step], tasks=shards, workers=1, logging_dir=str(output / LOGS))
            _run_here(local, workers or cores(), lambda done: on_progress("shards", len(there) + done, shards))
        return PrepareResult(output, shards, missing, step.finish())


@dataclass(frozen=True)
class MakeShard:
    """A step of datatrove's pipelines: a task makes the shard of its number.

    Args:
        given: arguments of `prepare`.
        folder: where to write.
        made_of, data: what goes into the manifest.
        whole_shards: whether tasks read files, or shards of the source, of their own.
        versions: of the packages where the work began; those of each machine must be the same.
    """

    given: dict[str, Any]
    folder: str
    made_of: MadeOf
    data: dict[str, Any]
    shards: int
    whole_shards: bool
    versions: dict[str, str]

    @classmethod
    def of(cls, given: dict[str, Any], folder: Path, shards: int) -> "MakeShard":
        """The step for some arguments, which reads what there is to read."""
        made_of, source = MadeOf.of(*_sides(json.dumps(given))), given["data"]
        documents = _documents(given)
        local = find_files(source) is not None
        data = {"source": source, "split": given["split"], "text_field": given["text_field"]}
        data |= {"digest": digest_files(source)} if local else {"revision": hub_revision(source)}
        data |= {"listing": _listing(documents), "seed": SEED, "piece_characters": _most(given)}
        return cls(given, str(folder), made_of, data, shards, documents.num_shards >= shards, package_versions())

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Make the shard of a task, if it is not there; datatrove calls it."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is one thread
        if rank in records_there(Path(self.folder), world_size, only=rank):
            return
        here, sides, documents = package_versions(), _sides(json.dumps(self.given)), _documents(self.given)
        for what, was, now in (
            ("versions", self.versions, here),
            ("tokenizers", self.made_of, MadeOf.of(*sides)),
            ("data", self.data["listing"], _listing(documents)),
        ):
            if was != now:
                raise ValueError(f"{what}: wanted what the work began with on every machine, {was}, got {now}")
        name = shard_name(rank, world_size)
        write_shard(Path(self.folder), name, self._texts(documents, rank, world_size), *sides)

    def _texts(self, documents: Texts, number: int, count: int) -> Iterator[str]:
        if self.whole_shards:
            own = (documents.shard(x) for x in range(number, documents.num_shards, count))
            return bounded_pieces(chain.from_iterable(own))
        return islice(bounded_pieces(documents), number, None, count)

    def begin(self) -> None:
        """Write down what was asked for, or compare with what the folder was begun with.

        Raises:
            ValueError: it was begun with something else.
            FileExistsError: something else is there.
        """
        folder = Path(self.folder)
        asked = {"made_of": self.made_of._asdict(), "data": self.data, "shards": {"shards": self.shards}}
        asked = json.loads(json.dumps(asked | {"versions": self.versions}))
        if not (folder / ASKED).exists():
            if others := [x.name for x in folder.iterdir() if x.name != LOGS]:
                raise FileExistsError(f"output: wanted a new or empty folder, but {self.folder!r} has {others[0]!r}")
            write_text(folder / ASKED, json.dumps(asked, indent=1) + "\n")
            return
        with damaged_files(folder / ASKED, "output", by="`matt-fast prepare`"):
            before = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            check_content("prepare", before, dict.fromkeys(asked, dict))
        others = [
            f"{name}: was {before[part].get(name)!r}, now {asked[part].get(name)!r}"
            for part in asked
            for name in sorted(before[part].keys() | asked[part].keys())
            if before[part].get(name) != asked[part].get(name)
        ]
        if others:
            raise ValueError(f"output: wanted what {self.folder!r} was begun with, got " + "; ".join(others))

    def finish(self) -> Manifest:
        """Write the manifest.

        Raises:
            ValueError: shards are missing, or none has a chunk.
        """
        folder = Path(self.folder)
        there = records_there(folder, self.shards)
        if missing := sorted(set(range(self.shards)) - there.keys()):
            raise ValueError(
                f"output: wanted {self.shards} shards in {self.folder!r}, got {len(there)}, without "
                f"{shard_name(missing[0], self.shards)}; {LOGS}/ says why, and the same command makes what is missing"
            )
        manifest = Manifest(self.made_of, self.data, tuple(there[x] for x in range(self.shards)), self.versions)
        if manifest.counts["chunks"] == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items()) or "no documents"
            raise ValueError(f"data: wanted text to train on in {self.data['source']!r}, got none ({reasons})")
        write_text(folder / MANIFEST, manifest.to_json())
        return manifest


@dataclass(frozen=True)
class Finish:
    """A step of datatrove's pipelines behind all shards: writes the manifest."""

    step: MakeShard

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        self.step.finish()


@cache
def _sides(given: str) -> tuple[Side, Side]:
    """The two sides for arguments of `prepare`, as JSON; loaded once in a process."""
    values = json.loads(given)
    training = TrainingOptions() if values["teacher"] is None else TrainingOptions(objective="alm")
    return Subject(job_of(values | {"training": training}), None).sides


def _documents(given: dict[str, Any]) -> Texts:
    options = {"split": given["split"], "text_field": given["text_field"]}
    return read_documents(given["data"], **options, seed=SEED, most=_most(given))


def _most(given: dict[str, Any]) -> int:
    """Characters of a piece of a long text, as in training on the fly."""
    return PIECE_CHARACTERS * given["max_length"]


def _listing(documents: Texts) -> str:
    """A digest of the names and sizes of local files; of others of the number of shards."""
    files = documents.files
    listing = documents.num_shards if files is None else [[x.name, x.stat().st_size] for x in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _absolute(place: str | Path | None) -> str | None:
    if place is None:
        return None
    return str(Path(place).absolute()) if Path(place).exists() else str(place)


def _executor(name: str, options: Mapping[str, Any]) -> Callable[..., "PipelineExecutor"]:
    """An executor's class with some of its arguments.

    Raises:
        TypeError: it takes no such argument, or needs one that is not there.
        ImportError: datatrove or Ray is not installed.
    """
    try:
        from datatrove import executor
        from datatrove.utils.logging import logger
    except ImportError as error:
        raise ImportError(f"matt-fast prepare needs datatrove: {install_line('prepare')}") from error
    logger.remove()  # what it says lies in logs/
    if name == "ray":
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"executor='ray' needs Ray, and a cluster that it finds: {packages_line('ray')}"
            ) from error
    kinds = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
    kind = getattr(executor, kinds[name])
    known = inspect.signature(kind).parameters
    ours = ("pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends")
    if unknown := sorted(x for x in options if x not in known or x in ours):
        free = ", ".join(x for x in known if x not in ours)
        raise TypeError(f"executor_options: wanted options of {kind.__name__} ({free}), got {', '.join(unknown)}")
    if missing := [x for x, y in known.items() if y.default is y.empty and x not in (*ours, *options)]:
        raise TypeError(f"executor_options: wanted {' and '.join(missing)} for {kind.__name__}, got none")
    return lambda *given, **more: kind(*given, **more, **options)


def _run_here(executor: "PipelineExecutor", workers: int, on_done: Callable[[int], None]) -> None:
    """Run the tasks of a local executor in processes that end with this one, and whose death is noticed.

    The executor's own pool waits for ever for a worker that was killed.
    """
    ranks = executor.get_incomplete_ranks()
    with OrderedPool(min(workers, len(ranks)), _Quiet(executor)) as pool:
        for done, _ in enumerate(pool.map("run", ranks), 1):
            on_done(done)


class _Quiet:
    """Runs tasks; what datatrove would print is in its logs, and an error is raised."""

    def __init__(self, executor: "PipelineExecutor"):
        self.executor = executor

    def run(self, rank: int) -> None:
        with redirect_stderr(io.StringIO()):
            self.executor._run_for_rank(rank, local_rank=1)


def _run_slurm(make: Callable[..., "PipelineExecutor"], step: MakeShard, workers: int | None) -> None:
    """Submit a job with a task for each shard, and behind it one that writes the manifest."""
    logs = Path(step.folder, LOGS)
    shards = make([step], tasks=step.shards, workers=workers or -1, logging_dir=str(logs))
    last = make([Finish(step)], tasks=1, workers=1, logging_dir=str(logs / "finish"), depends=shards)
    (logs / "finish" / "completions" / "00000").unlink(missing_ok=True)
    last.run()


def summary(manifest: Manifest) -> dict[str, Any]:
    """What a person wants to know of a manifest."""
    return {"digest": manifest.digest, **manifest.counts, "skipped": dict(manifest.skipped)}
