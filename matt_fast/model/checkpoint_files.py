"""What a model's weight files hold, by their headers: whether all is there, of the right shape, and can be saved."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from matt_fast.model.folders import ADAPTER
from matt_fast.model.teacher import Teacher, only_errors
from matt_fast.support.files import LFS_POINTER

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LARGEST_POINTER = 1024  # bytes
NAMED = 5  # tensors that an error names
BUFFER = re.compile(r"(?:inv_freq|attn\.(?:masked_)?bias|position_ids|relative_position_index)$")  # made, not read


def check_weights(teacher: Teacher) -> set[str]:
    """Compare the tensors in a model's files with those that it needs, without reading any.

    Names and shapes go through transformers' own loading, on the meta device, so that what it renames, fuses, ties or
    leaves out counts as it does there. Models with code of their own, with adapters and with quantised weights are not
    compared, nor are those of the hub of which neither the cache has the files nor the hub tells the headers.

    Returns:
        the names of tensors that the model's class has no place for, so that they are left out. Those of `BUFFER` are
        no weights: older files have them.

    Raises:
        ValueError: pickled weights, which are not allowed; a file that is cut off, or that stands for another
            (git-lfs); tensors that are missing or of another shape.
        FileNotFoundError: no weights, or not all that an index names.
    """
    folder = Path(teacher.model)
    if folder.is_dir():
        check_pointers(folder)
        files = weight_files(folder, teacher)
        shapes = {} if files[0].suffix != ".safetensors" else read_shapes(files)
    else:
        files = []
        shapes = _shapes_on_hub(str(teacher.model), getattr(teacher.config, "_commit_hash", None))
    if not shapes or (folder / ADAPTER).exists() or is_quantised(teacher):
        return set()
    outline = teacher.stored.outline(torch.float32)
    if outline.is_remote_code():
        return set()
    name = str(teacher.model)
    try:
        loading = _load_outline(outline, shapes)
    except RuntimeError as error:
        raise ValueError(
            f"model: wanted all parts of the weights that transformers puts together (of experts, say), got in "
            f"{name!r} some that are missing or do not fit"
        ) from error
    check_loaded(loading, name)
    ignored = [re.compile(x) for x in outline._keys_to_ignore_on_load_unexpected or ()] + [BUFFER]
    known = outline.state_dict().keys()
    silent = {name for name in shapes.keys() - known if any(pattern.search(name) for pattern in ignored)}
    return set(loading["unexpected_keys"]) | silent


def check_loaded(loading: Mapping, name: str, argument: str = "model", needless: Collection[str] = ()) -> None:
    """Raise a ValueError unless all weights were there, by what transformers tells of loading them.

    Args:
        loading: its `output_loading_info`.
        name: of the model.
        argument: what errors call it.
        needless: names of weights that may be missing.
    """
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        lines = [f"{key} {list(got)} instead of {list(wanted)}" for key, got, wanted in mismatched]
        raise ValueError(
            f"{argument}: wanted weights of the shapes that its configuration says, got in {name!r}: {some_of(lines)}"
        )
    missing = sorted(set(loading["missing_keys"]) - set(needless))
    if missing:
        unknown = sorted(loading["unexpected_keys"])
        other = f"; it has {len(unknown)} that are not expected: {some_of(unknown)}" if unknown else ""
        raise ValueError(
            f"{argument}: wanted all weights, but {len(missing)} are missing in {name!r}, and transformers would draw "
            f"them at random: {some_of(missing)}{other}"
        )


def check_savable(teacher: Teacher) -> None:
    """Raise a ValueError that says why if a model's quantised weights cannot be saved again with a new vocabulary."""
    settings = _quantization(teacher)
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    wanted = f"model: wanted weights in full precision, got {str(teacher.model)!r}, quantised by {method}"
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
        if getattr(quantizer.quantization_config, "dequantize", False):
            return
        savable = quantizer.is_serializable()
        for conversion in quantizer.get_weight_conversions():
            conversion.reverse_transform()
    except NotImplementedError:
        savable = False
    except (ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, which cannot be loaded here: {error}") from error
    if not savable:
        raise ValueError(
            f"{wanted}, which transformers loads but cannot save; take the model it was made of, or save what "
            "`dequantize()` makes of it"
        )


def check_pointers(folder: Path) -> None:
    """Raise a ValueError if a file in a model's or tokenizer's folder only stands for one that git-lfs would fetch."""
    for file in sorted(folder.glob("*")):
        unused = file.suffix in (".md", ".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pth")
        if not unused and file.is_file() and is_pointer(file):
            raise ValueError(
                f"{str(file)!r}: wanted its content, got a pointer of git-lfs; `git lfs pull` in its folder fetches it"
            )


def is_pointer(file: Path) -> bool:
    if file.stat().st_size > LARGEST_POINTER:
        return False
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def weight_files(folder: Path, teacher: Teacher) -> list[Path]:
    """The files that transformers loads weights from: one, or what an index names.

    Raises:
        ValueError: they are pickled and that is not allowed, or a pointer of git-lfs is in their place.
        FileNotFoundError: there are none, or not all that an index names.
    """
    allow_pickle = not teacher.use_safetensors
    named = getattr(teacher.config, "transformers_weights", None)
    names = (named,) if named else (SINGLE, INDEX, *(PICKLED if allow_pickle else ()))
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        pickled = [name for name in PICKLED if (folder / name).is_file()]
        other = f"only {pickled[0]}: loading a pickle can run code, see allow_pickle" if pickled else "none of them"
        raise FileNotFoundError(f"model: wanted {' or '.join(names)} in {str(folder)!r}, got {other}")
    files = [first]
    if first.suffix == ".json":
        files = _named_by(first)
    for file in files:
        if not allow_pickle and file.suffix != ".safetensors":
            raise ValueError(
                f"model: wanted weights in .safetensors, but {first.name} in {str(folder)!r} names {file.name}: "
                "loading a pickle can run code, see allow_pickle"
            )
        if not file.is_file():
            raise FileNotFoundError(f"model: wanted {file.name} in {str(folder)!r}, which {first.name} names")
        if is_pointer(file):
            check_pointers(folder)
            raise ValueError(f"{str(file)!r}: wanted weights, got a pointer of git-lfs; `git lfs pull` fetches them")
    return files


def source_files(teacher: Teacher) -> list[Path]:
    """The files that a model's weights are in; those of the hub are fetched where the cache does not have them.

    Raises:
        ValueError, FileNotFoundError: as `weight_files`.
    """
    folder = Path(teacher.model)
    if folder.is_dir():
        return weight_files(folder, teacher)
    for name in (SINGLE, INDEX, *(() if teacher.use_safetensors else PICKLED)):
        found = cached_file(str(teacher.model), name, _raise_exceptions_for_missing_entries=False)
        if found is not None and name.endswith(".json"):
            return [Path(x) for x in get_checkpoint_shard_files(str(teacher.model), found)[0]]
        if found is not None:
            return [Path(found)]
    raise FileNotFoundError(f"model: wanted {SINGLE} or {INDEX} in {str(teacher.model)!r}, got neither")


def configured_dtype(teacher: Teacher) -> torch.dtype | None:
    """The dtype that a model's configuration names; None where it names none.

    Raises:
        ValueError: it is none that a model can be made in.
    """
    named = getattr(teacher.config, "dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if named is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(
            f"model: wanted a dtype such as float32, bfloat16 or float16 in the configuration of "
            f"{str(teacher.model)!r}, got {named}"
        )
    return dtype


def stored_dtype(teacher: Teacher) -> torch.dtype:
    """The dtype that a result is written in: the configuration's, else that of the first tensor in the files."""
    dtype = configured_dtype(teacher)
    if dtype is not None:
        return dtype
    first = source_files(teacher)[0]
    if first.suffix != ".safetensors":
        return torch.float32
    with safe_open(first, "pt") as tensors:
        dtypes = (tensors.get_slice(name)[:0].dtype for name in tensors.keys() if tensors.get_slice(name).get_shape())  # noqa: SIM118
        return next((x for x in dtypes if x.is_floating_point), torch.float32)


def _named_by(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.with_name(name) for name in sorted(names)]
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: wanted names of files beside it in the weight_map of {str(index)!r}, got {error}"
        ) from error


def read_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """Name -> shape of all tensors in safetensors files, of which only the headers are read.

    Raises:
        ValueError: a file is cut off or damaged.
    """
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"model: wanted whole weights in {str(file)!r}, got a damaged file ({error})") from error
    return shapes


def _load_outline(outline: PreTrainedModel, shapes: dict[str, list[int]]) -> dict:
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with only_errors():
        return type(outline).from_pretrained(None, config=outline.config, state_dict=weights, **options)[1]


def _shapes_on_hub(name: str, commit: str | None) -> dict[str, list[int]]:
    """From the cache, else from the hub, which hands out headers alone; nothing where neither can tell."""
    from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache

    for file in (SINGLE, INDEX):
        cached = try_to_load_from_cache(name, file, revision=commit)
        if isinstance(cached, str):
            files = [Path(cached)] if file == SINGLE else _named_by(Path(cached))
            if all(x.is_file() and x.suffix == ".safetensors" for x in files):
                return read_shapes(files)
    try:
        headers = get_safetensors_metadata(name, revision=commit).files_metadata
    except Exception:  # of many kinds; loading the weights will say what is wrong
        return {}
    return {key: info.shape for header in headers.values() for key, info in header.tensors.items()}


def is_quantised(teacher: Teacher) -> bool:
    return bool(_quantization(teacher))


def _quantization(teacher: Teacher) -> object:
    text_config = teacher.config.get_text_config(decoder=True)
    return getattr(teacher.config, "quantization_config", None) or getattr(text_config, "quantization_config", None)


def some_of(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
