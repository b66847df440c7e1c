"""The texts of a model's licence, which whoever gets a model that is made of it is to get too."""

from pathlib import Path

from huggingface_hub import snapshot_download

NAMES = ("license", "licence", "notice", "copying", "use_policy")  # in either case, with any ending of a text
ENDINGS = ("", "-*", "[.]md", "[.]txt", "[.]pdf")
ANY_CASE = ["".join(f"[{x}{x.upper()}]" if x.isalpha() else x for x in name) for name in NAMES]
PATTERNS = [name + ending for name in ANY_CASE for ending in ENDINGS]


def copy_licence(model: str | Path, folder: Path) -> list[str]:
    """Copy a model's LICENSE, NOTICE, COPYING and use policies.

    Args:
        model: folder or hub name.
        folder: of the result; files that it has are kept.

    Returns:
        a line if the hub could not be asked for them.
    """
    place = Path(model)
    if not place.is_dir():
        try:
            place = Path(snapshot_download(str(model), allow_patterns=PATTERNS))
        except Exception as error:  # of many kinds: no network, no access
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return [f"LICENSE: the texts of the licence of {str(model)!r} could not be copied ({line})"]
    for path in sorted({path for pattern in PATTERNS for path in place.glob(pattern) if path.is_file()}):
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return []
