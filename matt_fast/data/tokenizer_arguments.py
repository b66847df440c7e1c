"""What can be told of the arguments of `tokenizers.extend`, `train`, `merge` and `prune` by their values, and by the
first rows of local texts. Imports nothing slow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matt_fast.data.reading import check_plain_text, check_texts
from matt_fast.model.folders import check_tokenizer_place
from matt_fast.support.checks import MANY, TOKENIZER_KINDS, check_choice, check_new_folder, check_outside, check_range

LEAST = {"add": 1, "size": 1, "keep": 1, "max_token_length": 2}


def check_tokenizer_arguments(arguments: Mapping[str, Any]) -> None:
    """Check what is there of them, by name; objects given in Python are left alone.

    Raises:
        ValueError: a value that they do not take, or a text that cannot be read; the message names it.
        OSError: a path where nothing is, or an output that has something in it or cannot be written.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in ("model", "other", "like"):
        if isinstance(given.get(name), str | Path):
            check_tokenizer_place(given[name], name)
    if isinstance(given.get("words"), str | Path):
        check_plain_text(given["words"], "words")
    if "data" in given:
        check_outside("output", given["output"], "data", given["data"])
        check_texts("data", given["data"], given["text_field"])
    elif "add" in given and "words" not in given:
        raise ValueError("data: wanted text to learn tokens from, or words, got neither")
    for name, least in LEAST.items():
        check_range(name, given.get(name), least, MANY)
    if "kind" in given:
        check_choice("kind", given["kind"], TOKENIZER_KINDS)
    check_new_folder("output", given["output"])
