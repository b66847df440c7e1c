"""What must be the same on every machine of a run: settings, versions, and files by what is in them."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from matt_fast.data.compressed import ending_of
from matt_fast.data.reading import find_files
from matt_fast.recipe.job import Job
from matt_fast.runs.folder import Resume
from matt_fast.support.fingerprints import fingerprint_file, fingerprint_folder
from matt_fast.support.version import PACKAGE, own_version

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "numpy", "safetensors")
ENDS = 1 << 16  # bytes of a text that are read at its beginning, in its middle and at its end


def same_everywhere(job: Job, resume: Resume) -> dict[str, str]:
    """Name -> value or digest; read in seconds, also of large files, which the main process reads whole later.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    found = {"matt-fast": own_version(), "code of matt-fast": _code(), **libraries()}
    settings = job.settings() | {"resume": resume}
    found |= {f"setting {name}": json.dumps(value, default=str) for name, value in settings.items()}
    for argument in ("model", "teacher", "tokenizer", "donor", "init", "parallel"):
        place = getattr(job, argument)
        if not isinstance(place, str | Path) or not Path(place).exists():  # of the hub, where a name says enough
            continue
        path = Path(place)
        prints = fingerprint_folder(path) if path.is_dir() else {path.name: fingerprint_file(path)}
        found |= {f"{argument} file {name}": digest for name, digest in prints.items()}
    texts = {"data": job.data} | {f"eval_data {name}": place for name, place in job.held_out.items()}
    for argument, place in texts.items():
        files = None if place is None else find_files(place, argument)
        for file in files or ():
            name = file.relative_to(place).as_posix() if file != Path(place) else ending_of(file)
            found[f"{argument} file {name}"] = _ends(file)
    return found


def libraries() -> dict[str, str]:
    """Name -> version of what decides on the bits of a result beside this package."""
    return {"python": platform.python_version()} | {library: version(library) for library in LIBRARIES}


def _code() -> str:
    """A digest of this package: checkouts of one version may differ."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(json.dumps([str(file.relative_to(PACKAGE)), fingerprint_file(file)]).encode())
    return digest.hexdigest()


def _ends(file: Path) -> str:
    """A digest of a text's size, beginning, middle and end: all of it would be read again for each machine."""
    size = os.path.getsize(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for place in (0, max(0, size // 2 - ENDS // 2), max(0, size - ENDS)):
            stream.seek(place)
            digest.update(stream.read(ENDS))
    return "ends:" + digest.hexdigest()
