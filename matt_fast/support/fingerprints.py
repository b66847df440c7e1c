"""Fingerprints of the files that a run depends on: by content, so that a file that was replaced is told by name."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

SMALL = 16 << 20  # bytes: up to here a file is read whole
SAMPLE = 4 << 10  # bytes of a larger one that are read at each of evenly spaced places
STRIDE = 4 << 20  # bytes between two of them, at most
SAMPLES = 1024  # of them, at least
HIGHEST_HEADER = 100 << 20  # bytes: more is no header of safetensors
COMMIT = "commit"
TEMPLATES = "additional_chat_templates"  # where transformers looks for more than one


def fingerprint_file(path: str | Path) -> str:
    """A digest of a file's content: of all of it, or, above 16 MiB, of its size, beginning, end and samples between.

    Of a safetensors file the whole header counts. Samples are 4 KiB in every 4 MiB or closer, so that a checkpoint of
    50 GB is told from another in seconds; a change of less than 4 MiB in a large file can go unseen.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= SMALL:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        header = int.from_bytes(file.read(8), "little") if str(path).endswith(".safetensors") else 0
        file.seek(0)
        digest.update(file.read(max(SAMPLE, 8 + header if header <= HIGHEST_HEADER else 0)))
        for place in range(0, size - SAMPLE, max(SAMPLE, min(STRIDE, size // SAMPLES))):
            file.seek(place)
            digest.update(file.read(SAMPLE))
        file.seek(size - SAMPLE)
        digest.update(file.read())
    return f"samples of {size} bytes:{digest.hexdigest()}"


def fingerprint_folder(path: str | Path) -> dict[str, str]:
    """Name -> `fingerprint_file` of each file of a model's or tokenizer's folder.

    Hidden files, .md files and subfolders do not count, but for further chat templates.
    """
    folder = Path(path)
    files = [x for x in sorted(folder.iterdir()) if not x.name.startswith(".") and x.suffix != ".md"]
    files += sorted((folder / TEMPLATES).glob("*"))
    return {x.relative_to(folder).as_posix(): fingerprint_file(x) for x in files if x.is_file()}


def fingerprint_model(model: str | Path) -> dict[str, str]:
    """`fingerprint_folder` of a model or tokenizer; of one of the hub of what is in the cache, and its commit.

    Raises:
        ValueError: it is no folder, and nothing of that name is in the hub's cache.
    """
    if Path(model).is_dir():
        return fingerprint_folder(model)
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        file = try_to_load_from_cache(str(model), name)
        if isinstance(file, str):
            snapshot = Path(file).parent
            return {COMMIT: snapshot.name, **fingerprint_folder(snapshot)}
    raise ValueError(f"model: {str(model)!r} is no folder here, and nothing of it is in the hub's cache")


def compare(old: Mapping[str, str | None], new: Mapping[str, str | None]) -> list[str]:
    """What differs between two fingerprints, a line for each file; what one of them does not know (None) does not.

    Of two that have a commit only the files that both have are compared: more may be in the cache by now.
    """
    both_of_hub = COMMIT in old and COMMIT in new
    differences = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            if not both_of_hub:
                differences.append(f"{name} is {'gone' if name in old else 'new'}")
        elif None not in (old[name], new[name]) and old[name] != new[name]:
            values = f": {old[name]} was, {new[name]} is" if name == COMMIT else ""
            differences.append(f"{name} has changed{values}")
    return differences
