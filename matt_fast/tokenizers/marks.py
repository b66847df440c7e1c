"""Words that older pre-tokenizers cut at marks: vowel signs of Indic scripts, Khmer and Thai, accents written apart.

GPT-2's pattern and those made after it take letters (`\\p{L}`) for words, and marks (`\\p{M}`) for signs. No token then
spans a vowel sign and its letter, so Hindi gets tokens for halves of syllables at best.
"""

import copy
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from matt_fast.support.texts import BROKEN
from matt_fast.tokenizers.result import texts_of
from matt_fast.tokenizers.source import Source

# What `tokenizers` has for ByteLevel with use_regex.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PROBE = "\u0915\u093f\u0924\u093e"  # two letters of Devanagari with a vowel sign each
LETTER, MARK = r"\p{L}", r"\p{M}"
CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]|\\p\{L\}")


def cuts_at_marks(source: Source) -> bool:
    """Whether the pre-tokenizer cuts a word at its vowel signs."""
    pre_tokenizer = source.plain.pre_tokenizer
    return pre_tokenizer is not None and len(pre_tokenizer.pre_tokenize_str(PROBE)) > 1


def cut_at_marks(source: Source, texts: Iterable[str]) -> float:
    """The share of the texts' letters and marks that are marks at which the pre-tokenizer cuts words."""
    if not cuts_at_marks(source):
        return 0.0
    kinds = Counter(unicodedata.category(character)[0] for text in texts for character in text)
    return kinds["M"] / max(1, kinds["M"] + kinds["L"])


def join_marks(source: Source) -> Source:
    """The tokenizer with a pre-tokenizer that takes marks behind a letter for a part of it.

    Texts without such marks are cut as before, emoji with a variation selector (a mark behind a sign) among them. What
    the base writes as a mark and a sign behind it, as Llama 3 does with a vowel sign and a comma, is cut too.

    Raises:
        ValueError: its pre-tokenizer has no pattern of letters to put marks into.
    """
    if not cuts_at_marks(source):
        return source
    backend = copy.deepcopy(source.backend)
    backend["pre_tokenizer"] = _joined(backend["pre_tokenizer"])
    made = Source(copy.deepcopy(source.tokenizer), backend, source.argument)
    if cuts_at_marks(made):
        got = source.backend["pre_tokenizer"]
        raise ValueError(f"join_marks: wanted a pre-tokenizer with a pattern of letters (\\p{{L}}), got {got}")
    made.tokenizer.backend_tokenizer.pre_tokenizer = made.plain.pre_tokenizer
    return made


def cut_tokens(source: Source, joined: Source) -> list[str]:
    """Texts of the base's tokens that `joined`, of `join_marks`, cuts behind a mark, where that has a letter before."""
    if joined is source:
        return []
    whole = (x for x in texts_of(source, source.entries) if BROKEN not in x)
    marked = (x for x in whole if any(unicodedata.category(c)[0] == "M" for c in x))
    before, now = source.plain.pre_tokenizer, joined.plain.pre_tokenizer
    in_word = {x: x if unicodedata.category(x[0])[0] != "M" else PROBE[0] + x for x in marked}
    return [x for x, y in in_word.items() if len(now.pre_tokenize_str(y)) > 1 == len(before.pre_tokenize_str(x))]


def _joined(part: dict) -> dict:
    if part["type"] == "Sequence":
        return part | {"pretokenizers": [_joined(x) for x in part["pretokenizers"]]}
    if part["type"] == "Split" and "Regex" in part["pattern"]:
        return part | {"pattern": {"Regex": _with_marks(part["pattern"]["Regex"])}}
    # A space put in front of the text would come in front of each word behind a split.
    if part["type"] == "ByteLevel" and part["use_regex"] and not part["add_prefix_space"]:
        split = {"type": "Split", "pattern": {"Regex": _with_marks(GPT2)}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, part | {"use_regex": False}]}
    return part


def _with_marks(pattern: str) -> str:
    """A pattern in which each letter takes the marks behind it; signs keep theirs, as in an emoji."""

    def joined(found: re.Match) -> str:
        kind = found[0]
        takes_letters = LETTER in kind and MARK not in kind and not kind.startswith("[^")
        return f"(?:{kind}{MARK}*)" if takes_letters else kind

    return CLASS.sub(joined, pattern)
