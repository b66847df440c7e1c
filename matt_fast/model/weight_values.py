"""The values in a model's weight files: whether all are finite, and whether a result has the same ones."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from matt_fast.model.checkpoint_files import is_quantised, some_of, source_files, stored_dtype
from matt_fast.model.tables import table_names
from matt_fast.model.teacher import Teacher

AT_ONCE = 1 << 24  # values in memory
KEPT_WIDE = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # parts of models that stay float32


class WeightFiles:
    """Tensors of safetensors or pickled files by name, read a part at a time."""

    def __init__(self, files: Iterable[Path]):
        self._stack = ExitStack()
        self._places: dict[str, object] = {}
        for file in files:
            if file.suffix == ".safetensors":
                opened = self._stack.enter_context(safe_open(file, "pt"))
                self._places |= dict.fromkeys(opened.keys(), opened)
            else:
                self._places |= torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)

    def __enter__(self):
        return self

    def __exit__(self, *given) -> None:
        self._places.clear()
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return {name for name, x in self._places.items() if not isinstance(x, torch.Tensor) or x.numel()}

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places[name]
        return tuple(place.shape if isinstance(place, torch.Tensor) else place.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        place = self._places[name]
        if isinstance(place, torch.Tensor):
            return place.dtype
        return (place.get_slice(name)[:0] if self.shape(name) else place.get_tensor(name)).dtype

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows), together the tensor; a scalar is one part."""
        place, shape = self._places[name], self.shape(name)
        if not shape:
            yield 0, place if isinstance(place, torch.Tensor) else place.get_tensor(name)
            return
        rows = max(1, AT_ONCE // max(1, torch.Size(shape[1:]).numel()))
        whole = place if isinstance(place, torch.Tensor) else place.get_slice(name)
        for start in range(0, shape[0], rows):
            yield start, whole[start : start + rows]


def check_values(
    teacher: Teacher, unused: Collection[str], on_progress: Callable[[str, int, int | None], None]
) -> None:
    """Read all weights that a model uses, and look whether they can be what it runs with and what is written.

    Args:
        teacher: the model.
        unused: names of tensors that are left out, see `check_weights`.
        on_progress: called with "tensors", how many were read, and of how many.

    Raises:
        ValueError: values are NaN or infinite, as stored or in the dtype that the configuration names; or the
            configuration ties two tensors that are stored with different values.
    """
    outline = teacher.stored.outline(torch.float32)
    kept = [x for name in KEPT_WIDE for x in getattr(outline, name, None) or ()]
    dtype, wrong = stored_dtype(teacher), []
    with WeightFiles(source_files(teacher)) as weights:
        names = sorted(weights.names - set(unused))
        for done, name in enumerate(names):
            on_progress("tensors", done, len(names))
            to = None if is_quantised(teacher) or any(x in name for x in kept) else dtype
            if found := _not_finite(weights.parts(name), to):
                wrong.append(f"{name} {found}")
        on_progress("tensors", len(names), len(names))
        if wrong:
            raise ValueError(
                f"model: wanted weights that are finite, got NaN or infinite values in {str(teacher.model)!r}: "
                + some_of(wrong)
            )
        _check_tied(teacher, outline, weights)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], wanted: str) -> None:
    """Raise a ValueError that begins with `wanted` if tensors in memory have values that are NaN or infinite."""
    if wrong := [f"{name} {found}" for name, x in tensors if (found := _not_finite([(0, x)], None))]:
        raise ValueError(f"{wanted}, got NaN or infinite values: {some_of(wrong)}")


def _check_tied(teacher: Teacher, outline: PreTrainedModel, weights: WeightFiles) -> None:
    tied = getattr(outline, "all_tied_weights_keys", None) or {}
    for pair in tied.items():
        stored = [x for x in pair if x in weights.names]
        if len(stored) == 2 and not _equal(weights, stored[0], weights, stored[1]):
            raise ValueError(
                f"model: wanted {stored[0]} and {stored[1]} of {str(teacher.model)!r} to be the same, as its "
                "configuration ties them, got different values; if they are meant to differ, its config.json needs "
                '"tie_word_embeddings": false'
            )


def _not_finite(parts: Iterable[tuple[int, torch.Tensor]], dtype: torch.dtype | None) -> str:
    """What is wrong with a tensor, in words; nothing if all is well."""
    count, first, cast = 0, None, False
    for start, part in parts:
        if not part.is_floating_point():
            return ""
        part = part.float() if part.dtype.itemsize == 1 else part
        bad = ~part.isfinite()
        if not bad.any() and dtype is not None and torch.finfo(dtype).max < torch.finfo(part.dtype).max:
            bad, cast = ~part.to(dtype).isfinite(), True
        if bad.any():
            count += int(bad.sum())
            first = start + int(bad.reshape(len(bad), -1).any(1).nonzero()[0]) if first is None and bad.dim() else first
    if not count:
        return ""
    where = "" if first is None else f", the first in row {first}"
    return f"({count:,} values{where}" + (f", too large for {str(dtype).removeprefix('torch.')})" if cast else ")")


def check_same_weights(
    teacher: Teacher, folder: Path, model: PreTrainedModel, changed: Collection[str] = ()
) -> list[str]:
    """Look whether a result has the weights that the teacher has, bit for bit, but for its vocabulary's tables.

    Files are compared tensor by tensor. Where transformers stores other tensors than it read (experts that it joins,
    weights that were quantised), both models are loaded and compared.

    Args:
        teacher: where the model came from.
        folder: the result's.
        model: the result, of which names are read.
        changed: names of parameters that were trained too.

    Returns:
        a line if the source stores tensors with more digits than the dtype that its configuration names has.

    Raises:
        ValueError: there are differences, which it names.
    """
    tables = table_names(model) | set(changed)
    with WeightFiles(source_files(teacher)) as ours, WeightFiles(sorted(folder.glob("*.safetensors"))) as theirs:
        different = [name for name in _unlike(ours, theirs) if not _among(name, tables)]
        rounded = [name for name in sorted(theirs.names) if _is_rounded(ours, theirs, name, model.base_model_prefix)]
    if different:
        found, written = teacher.load("auto").state_dict(), teacher.load_result(folder, "auto").state_dict()
        names = (found.keys() | written.keys()) - tables
        same = {x for x in names & found.keys() & written.keys() if _same_bits(found[x], written[x])}
        different = sorted(names - same)
    if different:
        raise ValueError(
            f"result: wanted all weights outside the vocabulary as they are in {str(teacher.model)!r}, bit for bit, "
            f"but these differ: {some_of(different)}"
        )
    if not rounded:
        return []
    dtype = str(stored_dtype(teacher)).removeprefix("torch.")
    line = f"{len(rounded)} tensors are {dtype} now, as config.json has it, and were stored with more digits"
    return [f"model.safetensors: {line}: {some_of(rounded)}"]


def _is_rounded(source: WeightFiles, result: WeightFiles, name: str, prefix: str) -> bool:
    """Whether a tensor of the result has fewer digits than the source's, which may lack the body's name in front."""
    old = next((x for x in (name, name.removeprefix(f"{prefix}.")) if x in source.names), None)
    if old is None:
        return False
    dtypes = source.dtype(old), result.dtype(name)
    if not all(x.is_floating_point and x.itemsize > 1 for x in dtypes):  # whole numbers, quantised ones
        return False
    return torch.finfo(dtypes[0]).eps < torch.finfo(dtypes[1]).eps


def _unlike(source: WeightFiles, result: WeightFiles) -> list[str]:
    """Names of tensors of the result that no tensor of the source equals: of the same name, else of any unused one."""
    unlike, renamed = [], []
    for name in sorted(result.names):
        if name not in source.names:
            renamed.append(name)
        elif not _equal(source, name, result, name):
            unlike.append(name)
    if not renamed:
        return unlike
    left = Counter(_digest(source, name) for name in source.names - result.names)
    for name in renamed:
        digest = _digest(result, name)
        if not left[digest]:
            unlike.append(name)
        left[digest] -= 1
    return unlike


def _equal(source: WeightFiles, name: str, result: WeightFiles, other: str) -> bool:
    """Whether a tensor is the other one, as soon as it has its dtype."""
    if source.shape(name) != result.shape(other):
        return False
    pairs = zip(source.parts(name), result.parts(other), strict=True)
    return all(_same_bits(ours.to(theirs.dtype), theirs) for (_, ours), (_, theirs) in pairs)


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (ours, theirs)))


def _digest(files: WeightFiles, name: str) -> bytes:
    digest = blake2b(repr(files.shape(name)).encode(), digest_size=16)
    for _, part in files.parts(name):
        digest.update(str(part.dtype).encode())
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def _among(name: str, tables: set[str]) -> bool:
    """Whether a stored name is one of a model's, which may have the body's name in front or not."""
    return any(name == x or name.endswith(f".{x}") or x.endswith(f".{name}") for x in tables)
