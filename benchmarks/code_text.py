"""Code without a download: this interpreter's standard library, and a tokenizer with tokens for it."""

import json
import random
import sys
import sysconfig
from pathlib import Path

from bpe_continue import continue_training
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from manuals import write_texts  # isort: skip
from quickstart import CACHE  # isort: skip

NEW_TOKENS = 500
# A token may be anything inside one of these: a line end with its indentation and the line up to a digit, or the rest
# of a line behind a digit. Digits stay single, as in the model's own vocabulary.
PRE_TOKENS = r"\n+[^\S\n]*(?:[^\n\p{N}]*)|\p{N}|[^\n\p{N}]+"
NOT_PROSE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT_MODULES = 40


def write_corpus() -> tuple[Path, Path, list[str]]:
    """The standard library as two JSON-lines files: (to train on, held out, the texts to train on)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if not NOT_PROSE & set(file.relative_to(root).parts))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    random.Random(0).shuffle(texts)
    held_out, train = texts[:HELD_OUT_MODULES], texts[HELD_OUT_MODULES:]
    paths = CACHE / "stdlib-train.jsonl", CACHE / "stdlib-held-out.jsonl"
    for path, part in zip(paths, (train, held_out), strict=True):
        write_texts(path, part)
    return *paths, train


def extend_tokenizer(model: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """The model's tokenizer with NEW_TOKENS more, learned from `texts` on top of its own merges."""
    base = AutoTokenizer.from_pretrained(model)
    backend = json.loads(base.backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENS}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    extended = continue_training(
        Tokenizer.from_str(json.dumps(backend)),
        texts=texts,
        vocab_size=len(base) + NEW_TOKENS,
        show_progress=False,
    )
    roles = {role: getattr(base, role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=extended, **roles)
