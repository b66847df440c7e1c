"""Words that older pre-tokenizers cut at marks: vowel signs of Indic scripts, Khmer and Thai, accents written apart.

GPT-2's pattern and those made after it take letters (`\\p{L}`) for words, and marks (`\\p{M}`) for signs. No token then
spans a vowel sign and its letter, so Hindi gets tokens for halves of syllables at best.
"""

import copy
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from matt_fast.tokenizers.result import texts_of
from matt_fast.tokenizers.source import Source

# What `tokenizers` has for ByteLevel with use_regex.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PROBE = "\u0915\u093f\u0924\u093e"  # two letters of Devanagari with a vowel sign each
LETTERS, WITH_MARKS = r"\p{L}", r"\p{L}\p{M}"
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
    """The tokenizer with a pre-tokenizer that takes marks for letters. Texts without marks are cut as before.

    What the base writes as a mark and a sign behind it, as Llama 3 does with a vowel sign and a comma, is cut too.

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
    """Texts of the base's tokens that `joined`, of `join_marks`, cuts at a mark before merges apply."""
    if joined is source:
        return []
    whole = (x for x in texts_of(source, source.entries) if "\N{REPLACEMENT CHARACTER}" not in x)
    marked = (x for x in whole if any(unicodedata.category(c)[0] == "M" for c in x))
    before, now = source.plain.pre_tokenizer, joined.plain.pre_tokenizer
    return [x for x in marked if len(now.pre_tokenize_str(x)) > 1 == len(before.pre_tokenize_str(x))]


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
    """A pattern in which marks stand wherever letters do."""

    def joined(found: re.Match) -> str:
        if found[0] == LETTERS:
            return f"[{WITH_MARKS}]"
        return found[0] if r"\p{M}" in found[0] else found[0].replace(LETTERS, WITH_MARKS)

    return CLASS.sub(joined, pattern)
