"""Chunks in shards that are made once, on one machine or many, and read memory-mapped or as a stream.

A folder of `matt-fast prepare` has

    manifest.json                        what the chunks were made of, how many they are, and each shard's digest
    shards/00003-of-00008.arrow          chunks: an Arrow stream with the columns COLUMNS, int32 lists
    shards/00003-of-00008.json           what the manifest says of this shard

and, while it is made, prepare.json (what was asked for) and logs/ (of datatrove). Each file is whole or not there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from matt_fast.data.chunks import Side, identity, make_chunks
from matt_fast.data.packing import Chunk
from matt_fast.data.places import MANIFEST, is_url
from matt_fast.support.checks import made_of
from matt_fast.support.files import whole_file, write_text
from matt_fast.support.fingerprints import fingerprint_file
from matt_fast.support.installing import packages_line

SHARDS_VERSION = 1  # count up when shards change: folders of another version are refused
COLUMNS = ("teacher_ids", "student_ids", "teacher_segments", "student_segments")
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
SHARDS = "shards"
CHUNKS_TOGETHER = 1024  # that a record batch has, and that are shuffled together in a stream
PACKAGES = ("matt-fast", "tokenizers", "transformers", "datasets", "pyarrow", "datatrove")


class MadeOf(NamedTuple):
    """What decides on chunks beside their texts; of tokenizers a digest."""

    version: int
    teacher_tokenizer: str
    student_tokenizer: str
    teacher_rows: int
    student_rows: int
    teacher_max_length: int
    student_max_length: int

    @classmethod
    def of(cls, teacher: Side, student: Side) -> "MadeOf":
        sides = teacher, student
        digests = (hashlib.sha256(json.dumps(identity(side.tokenizer)).encode()).hexdigest() for side in sides)
        rows, lengths = [side.rows for side in sides], [side.max_length for side in sides]
        return cls(SHARDS_VERSION, *digests, *rows, *lengths)


@dataclass(frozen=True)
class ShardRecord:
    """A shard: its name in the folder, bytes, `fingerprint_file`, and what is in it."""

    name: str
    bytes: int
    fingerprint: str
    texts: int
    chunks: int
    teacher_tokens: int
    student_tokens: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of shards.

    Attributes:
        made_of: what decides on the chunks.
        data: the source, its digest or revision, and how it was read.
        shards: in their order.
        versions: of the packages that made them.
    """

    made_of: MadeOf
    data: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    versions: dict[str, str]

    @property
    def skipped(self) -> Counter:
        """What was left out, by reason."""
        return sum((Counter(shard.skipped) for shard in self.shards), Counter())

    @property
    def counts(self) -> dict[str, int]:
        """Texts, chunks and tokens of all shards."""
        names = ("texts", "chunks", "teacher_tokens", "student_tokens", "bytes")
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in names}

    @property
    def digest(self) -> str:
        """Changes with all that training could see of the folder."""
        content = [self.made_of, [[shard.name, shard.fingerprint] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        parts = {"made_of": self.made_of._asdict(), "data": self.data, "versions": self.versions}
        head = {"digest": self.digest, **self.counts, "skipped": dict(self.skipped)}
        return json.dumps(head | parts | {"shards": [asdict(x) for x in self.shards]}, indent=1) + "\n"


def shard_name(number: int, count: int) -> str:
    return f"{SHARDS}/{number:05}-of-{count:05}.arrow"


def write_shard(folder: Path, name: str, texts: Iterable[str], teacher: Side, student: Side) -> ShardRecord:
    """Write the chunks of some texts as a shard, and then its record; memory does not grow with the texts.

    Raises:
        ValueError: what `make_chunks` raises.
        OSError: they cannot be written; nothing of that name is there then.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    skipped: Counter = Counter()
    counts = dict.fromkeys(("texts", "chunks", "teacher_tokens", "student_tokens"), 0)

    def counted() -> Iterator[str]:
        for text in texts:
            counts["texts"] += 1
            yield text

    chunks = make_chunks(counted(), teacher, student, skipped)
    with whole_file(path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while together := list(islice(chunks, CHUNKS_TOGETHER)):
            columns = zip(*(chunk.arrays for chunk in together), strict=True)
            batch = pa.record_batch([_as_lists(arrays) for arrays in columns], schema=SCHEMA)
            writer.write_batch(batch)
            counts["chunks"] += len(together)
            for side in ("teacher", "student"):
                counts[f"{side}_tokens"] += len(batch.column(f"{side}_ids").values)
    record = ShardRecord(name, path.stat().st_size, fingerprint_file(path), **counts, skipped=dict(skipped))
    write_text(path.with_suffix(".json"), json.dumps(asdict(record)))
    return record


def _as_lists(arrays: Sequence[NDArray[np.int64]]) -> pa.Array:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(arrays).astype(np.int32)))


def as_chunks(columns: Mapping[str, Sequence[NDArray]]) -> Iterator[Chunk]:
    """Chunks from their columns on disk."""
    for row in zip(*(columns[name] for name in COLUMNS), strict=True):
        yield Chunk(*(x.astype(np.int64) for x in row))


def records_there(folder: Path, count: int, only: int | None = None) -> dict[int, ShardRecord]:
    """The records of the shards that are there as written, of so many, by their numbers; `only` looks at one alone."""
    found = {}
    for number in range(count) if only is None else (only,):
        path = folder / shard_name(number, count)
        record = path.with_suffix(".json")
        if record.exists() and path.exists():
            try:
                known = made_of(ShardRecord, json.loads(record.read_text(encoding="utf-8")))
            except (TypeError, ValueError):  # damaged: the shard is made again
                continue
            if path.stat().st_size == known.bytes and fingerprint_file(path) == known.fingerprint:
                found[number] = known
    return found


def package_versions() -> dict[str, str]:
    """Of the packages that decide on chunks, and of ours."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # datatrove, or a checkout that was never installed
            found[name] = "unknown"
    return found


def is_shards(place: str | Path) -> bool:
    """Whether shards are there, and not what `prepare_once` makes."""
    return is_url(place) or (Path(place) / MANIFEST).exists()


class Shards:
    """A folder of shards, local or at a URL that fsspec knows (s3://, hf://, memory:// …).

    Raises (by what reads):
        ValueError: no such folder, or it is damaged; the shard is named.
        ImportError: the package for such URLs is not installed.
    """

    def __init__(self, place: str | Path):
        self.place = str(place)

    def __len__(self) -> int:
        return len(self.manifest.shards)

    @cached_property
    def manifest(self) -> Manifest:
        try:
            with self.open(MANIFEST) as file:
                values = json.loads(file.read())
            known = MadeOf(**{name: values["made_of"].get(name) for name in MadeOf._fields})
            names = [x.name for x in fields(ShardRecord)]
            shards = tuple(made_of(ShardRecord, {name: x[name] for name in names}) for x in values["shards"])
            found = {"made_of": known, "data": values["data"], "shards": shards, "versions": values["versions"]}
            return made_of(Manifest, found)
        except FileNotFoundError as error:
            raise ValueError(
                f"prepared: wanted what `matt-fast prepare` made, got {self.place!r}, which has no {MANIFEST}: is it "
                "there, and all of it made?"
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"prepared: wanted a whole {MANIFEST} in {self.place!r}, got {error!r}") from error

    def open(self, name: str) -> IO[bytes]:
        """A file of the folder, for reading."""
        if not is_url(self.place):
            return Path(self.place, name).open("rb")
        filesystem, path = self._filesystem
        return filesystem.open(f"{path}/{name}", "rb")

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, path = fsspec.url_to_fs(self.place)
        except ImportError as error:
            package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}.get(self.place.split(":")[0])
            line = f": {packages_line(package)}" if package else ""
            raise ImportError(f"prepared: {self.place!r} cannot be read: {error}{line}") from error
        return filesystem, path.rstrip("/")

    def check(self, wanted: MadeOf) -> None:
        """Raise a ValueError that names what is not as wanted, or which shards are lost, cut or changed."""
        made_of = self.manifest.made_of
        pairs = zip(MadeOf._fields, wanted, made_of, strict=True)
        others = [f"{name} wanted {_short(want)}, got {_short(got)}" for name, want, got in pairs if want != got]
        if others:
            raise ValueError(
                f"prepared: {self.place!r} was made for something else ({'; '.join(others)}); make it with these "
                "tokenizers and this max_length: matt-fast prepare"
            )
        if damage := [line for shard in self.manifest.shards for line in self._damage(shard)]:
            more = f" and {len(damage) - SHOWN} more" if len(damage) > SHOWN else ""
            raise ValueError(
                f"prepared: {self.place!r} is damaged ({'; '.join(damage[:SHOWN])}{more}); the command that made it "
                "makes what is missing again"
            )
        if not self.manifest.counts["chunks"]:
            raise ValueError(f"prepared: wanted chunks to train on in {self.place!r}, got none")

    def _damage(self, shard: ShardRecord) -> Iterator[str]:
        if is_url(self.place):
            filesystem, path = self._filesystem
            try:
                size = filesystem.size(f"{path}/{shard.name}")
            except FileNotFoundError:
                size = None
        else:
            path = Path(self.place, shard.name)
            size = path.stat().st_size if path.exists() else None
        if size is None:
            yield f"{shard.name} is gone"
        elif size != shard.bytes:
            yield f"{shard.name}: wanted {shard.bytes:,} bytes, got {size:,}"
        elif not is_url(self.place) and fingerprint_file(path) != shard.fingerprint:
            yield f"{shard.name} has changed"

    def stream(self, number: int, seed: list[int], first: int = 0) -> Iterator[tuple[int, Iterator[Chunk]]]:
        """The groups of chunks of a shard, from one on, with their numbers; shuffled in themselves."""
        shard = self.manifest.shards[number]
        chunks = 0
        try:
            with self.open(shard.name) as file, pa.ipc.open_stream(file) as batches:
                for group, batch in enumerate(batches):
                    chunks += len(batch)
                    if group >= first:
                        order = np.random.default_rng([*seed, group]).permutation(len(batch))
                        columns = {name: _arrays(batch.column(name), order) for name in COLUMNS}
                        yield group, as_chunks(columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"prepared: {shard.name} of {self.place!r} cannot be read: {error}") from error
        if chunks != shard.chunks:
            raise ValueError(
                f"prepared: wanted {shard.chunks:,} chunks in {shard.name} of {self.place!r}, got {chunks:,}"
            )


SHOWN = 5  # damaged shards


def _arrays(column: pa.ListArray, order: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    values, ends = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[ends[index] : ends[index + 1]] for index in order]


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else repr(value)
