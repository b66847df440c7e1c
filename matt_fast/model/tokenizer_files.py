# ruff: noqa: RUF001 - look-alike characters are data
"""Load a tokenizer so that it gives the tokens that its tokenizer.json says, with its special tokens."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from matt_fast.alignment.vocabulary import check_constant, check_distinct_ids
from matt_fast.model.folders import contents
from matt_fast.support.checks import check_location

TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # than the model takes
FILE, SETTINGS = "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json")
# Where pre-tokenizers and normalisers differ: digits, contractions, cases, spaces, line ends, marks, scripts, signs.
PROBE = (
    "650841823 in 2023, 3.14159, 1e-10, 0xDEAD, No. 7",
    "I'm, we'll, they've, DON'T, it's; l'été, O’Neill",
    "camelCase HTTPServer snake_case SHOUTING iPhone",
    "  two  spaces   three\tand a tab\u00a0, and \u3000 wide",
    "def f(x):\n    if x:\n        return {}\n\n\n\treturn x**2 != 1  # no\r\n",
    " a line that ends in spaces  \n  \n",
    "naïve café, cafe\u0301, Straße, İstanbul, ﬁne ①",
    "Ελληνικά, Русский, العربية, עברית, हिन्दी, ไทย, 日本語の本, 中文。한국어 한",
    "<b>&amp;</b> https://example.org/a?b=c#d user@example.org $5 100% (a+b)--c...",
    "👩‍👩‍👧 👍🏽 ✓ \u200b \ufeff x",
)
# What the tokens of a role are called, the usual names first.
NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<｜begin▁of▁sentence｜>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<｜end▁of▁sentence｜>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>"),
    "unk_token": ("<unk>", "[UNK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}
WANTED = ("bos_token", "eos_token", "pad_token")  # by a model that generates


def load_tokenizer(path: str | Path, argument: str = "tokenizer", **options) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of a tokenizer.json alone, or of the hub.

    Where transformers builds another one than its tokenizer.json (by a class that tokenizer_config.json names), the
    file counts, and a warning says so; another one tells where added tokens have other ids than it says. One without
    any settings gets its special tokens by their names, with a warning.

    Args:
        path: folder, file or hub name.
        argument: what errors call it.
        **options: further arguments of `from_pretrained`; code of the place's own is not run unless they say so.

    Raises:
        FileNotFoundError: it can only be a path, and nothing is there.
        ValueError: it cannot be loaded, draws its tokens at random (`check_constant`), or has two tokens with one id
            (`check_distinct_ids`).
    """
    check_location(argument, path, (".json", ".gguf"))
    options = {"trust_remote_code": False} | options  # None would ask at the terminal
    try:
        tokenizer = _load(path, argument, options)
        tokenizer("a")  # settings of another type end here
    except Exception as error:  # of many kinds; a damaged file raises Exception itself
        line = next(iter(str(error).splitlines()), type(error).__name__)
        if line.rstrip().endswith(":") and Path(path).is_dir():  # and a list of what transformers would take
            line = f"wanted {FILE} in it, got {contents(Path(path))}"
        raise ValueError(f"{argument}: {str(path)!r} could not be loaded as a tokenizer: {line}") from error
    if not tokenizer.is_fast:
        return tokenizer
    check_constant(tokenizer, argument)
    tokenizer = _as_in_file(tokenizer, path, argument, options)
    check_distinct_ids(tokenizer, argument)
    tokenizer.deprecation_warnings[TOO_LONG] = True  # told already, for transformers: texts are cut behind it
    return tokenizer


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | Tokenizer) -> str | None:
    """The first line of `PROBE` that two tokenizers cut otherwise, or of which they make other tokens; None if none is.

    Other cuts give the same tokens where no token is long enough to tell, as none may be in another language's words.
    """
    for line in PROBE:
        ids = [
            x.encode(line, add_special_tokens=False).ids
            if isinstance(x, Tokenizer)
            else x(line, add_special_tokens=False, verbose=False)["input_ids"]
            for x in (one, other)
        ]
        cuts = [_cuts(x if isinstance(x, Tokenizer) else x.backend_tokenizer, line) for x in (one, other)]
        if ids[0] != ids[1] or (None not in cuts and cuts[0] != cuts[1]):
            return line
    return None


def _cuts(tokenizer: Tokenizer, line: str) -> list[str] | None:
    """Between what no merge applies; None of other vocabularies than byte-level ones, which say it in several ways."""
    if "ByteLevel" not in repr(tokenizer.pre_tokenizer):
        return None
    normalised = line if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(line)
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalised)]


def _load(path: str | Path, argument: str, options: Mapping) -> PreTrainedTokenizerBase:
    if Path(path).is_file():
        return _with_special_tokens(PreTrainedTokenizerFast(tokenizer_file=str(path)), path, argument)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if Path(path).is_dir() and not any(Path(path, name).is_file() for name in SETTINGS):
        return _with_special_tokens(tokenizer, path, argument)
    return tokenizer


def _as_in_file(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, argument: str, options: Mapping
) -> PreTrainedTokenizerBase:
    """`tokenizer`, or one that gives the tokens of its tokenizer.json where it does not."""
    if type(tokenizer).__module__.startswith("transformers_modules"):
        return tokenizer  # made by code that may do anything
    alone = Path(path).is_file()
    file = path if alone else cached_file(path, FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return tokenizer
    raw = json.loads(Path(file).read_text(encoding="utf-8"))
    _tell_other_ids(tokenizer, raw, path, argument)
    if alone:
        return tokenizer
    _take_prefix_space(raw.get("pre_tokenizer"), tokenizer)
    original = Tokenizer.from_str(json.dumps(raw))
    original.no_truncation()
    original.no_padding()
    line = first_difference(tokenizer, original)
    if line is None:
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(path, **options)
    ours = first_difference(plain, original) is None
    warnings.warn(
        f"{argument}: {type(tokenizer).__name__}, which transformers takes for {str(path)!r}, gives other tokens than "
        f"the {FILE} there, or cuts text otherwise, of {line!r} for example; "
        + ("those of the file are taken" if ours else "look whether they are right")
        + '. "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json would make them the same',
        stacklevel=3,
    )
    return plain if ours else tokenizer


def _tell_other_ids(tokenizer: PreTrainedTokenizerBase, raw: dict, path: str | Path, argument: str) -> None:
    """Warn of added tokens that have other ids than their file says: `tokenizers` counts them anew."""
    known = tokenizer.get_vocab()
    others = [x for x in raw.get("added_tokens", ()) if known.get(x["content"], x["id"]) != x["id"]]
    if others:
        token = others[0]["content"]
        warnings.warn(
            f"{argument}: {len(others):,} of the added tokens of {str(path)!r} have other ids than its {FILE} says, "
            f"{token!r} has {known[token]} for {others[0]['id']}: added tokens are counted anew. "
            "Look whether these are the model's rows, or write them into the vocabulary there under their ids",
            stacklevel=4,
        )


def _take_prefix_space(pre_tokenizer: dict | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """A space before texts is a setting of tokenizer_config.json too, which then counts."""
    setting = tokenizer.init_kwargs.get("add_prefix_space")
    for part in () if pre_tokenizer is None else (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())):
        if setting is not None and "add_prefix_space" in part:
            part["add_prefix_space"] = setting


def _with_special_tokens(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, argument: str
) -> PreTrainedTokenizerBase:
    """Give roles to the special tokens of a tokenizer that comes without settings; a warning says which."""
    if not tokenizer.is_fast or tokenizer.special_tokens_map:
        return tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [x["content"] for x in backend["added_tokens"] if x["special"]]
    names = {**NAMES, "unk_token": (backend["model"].get("unk_token"), *NAMES["unk_token"])}
    found = {role: next((x for x in of if x in special), None) for role, of in names.items()}
    found = {role: token for role, token in found.items() if token is not None}
    tokenizer.add_special_tokens(found)
    taken = ", ".join(f"{role} {token!r}" for role, token in found.items()) or "none"
    missing = ", ".join(role for role in WANTED if role not in found)
    warnings.warn(
        f"{argument}: {str(path)!r} has no tokenizer_config.json, which would say what its special tokens are for; "
        f"taken by their names: {taken}" + (f"; it has no {missing}" if missing else ""),
        stacklevel=4,
    )
    return tokenizer
