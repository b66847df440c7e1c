"""The texts of a model's licence, which whoever gets a model that is made of it is to get too."""

from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

NAMES = ("license", "licence", "notice", "copying", "use_policy")  # in either case, with any ending of a text
ENDINGS = ("", "-*", "[.]md", "[.]txt", "[.]pdf")
ANY_CASE = ["".join(f"[{x}{x.upper()}]" if x.isalpha() else x for x in name) for name in NAMES]
PATTERNS = [name + ending for name in ANY_CASE for ending in ENDINGS]


def copy_licence(model: str | Path, folder: Path, commit: str | None = None) -> list[str]:
    """Copy a model's LICENSE, NOTICE, COPYING and use policies.

    Args:
        model: folder or hub name.
        folder: of the result; files that it has are kept.
        commit: of the model on the hub.

    Returns:
        a line if they could not be read, or the hub not be asked which there are: no run ends by that.
    """
    place, texts, why = Path(model), {}, None
    try:
        if not place.is_dir():
            try:
                list_repo_files(str(model), revision=commit)
            except Exception as error:  # of many kinds: no network, no access; the cache need not have them all
                why = error
            place = Path(
                snapshot_download(
                    str(model), revision=commit, allow_patterns=PATTERNS, local_files_only=why is not None
                )
            )
        paths = {path for pattern in PATTERNS for path in place.glob(pattern) if path.is_file()}
        texts = {path.name: path.read_bytes() for path in sorted(paths) if not (folder / path.name).exists()}
    except Exception as error:
        why = error
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    if why is None:
        return []
    line = f"{type(why).__name__}: {why}".splitlines()[0]
    return [f"LICENSE: texts of the licence of {str(model)!r} may be missing, as they could not be read ({line})"]
