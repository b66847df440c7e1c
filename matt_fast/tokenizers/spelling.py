"""How a vocabulary would write a text as one token."""

import re

from matt_fast.alignment.vocabulary import BYTE_LEVEL, BYTE_OF
from matt_fast.tokenizers.source import Source

SPACE = "▁"


class Spelling:
    """How one vocabulary writes texts, and whether its pre-tokenizer lets one through in one piece."""

    def __init__(self, base: Source):
        self.tokenizer, self.sentencepiece = base.plain, base.sentencepiece
        added = [re.escape(token["content"]) for token in base.backend["added_tokens"]]
        self.added = re.compile("|".join(added)) if added else None

    def of_text(self, text: str) -> str | None:
        """The entry; None if the text would be cut or changed, or has an added token in it."""
        if self.added is not None and self.added.search(text):
            return None
        normaliser, pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        normal = text if normaliser is None else normaliser.normalize_str(text)
        found = [(normal, None)] if pre_tokenizer is None else pre_tokenizer.pre_tokenize_str(normal)
        entry, space = self._write(text.encode()), SPACE if self.sentencepiece else BYTE_LEVEL[ord(" ")]
        return entry if len(found) == 1 and found[0][0] in (entry, space + entry) else None

    def of_bytes(self, wanted: bytes) -> str | None:
        """The entry, also of a part of a character, which only a byte-level vocabulary can have."""
        try:
            return self.of_text(wanted.decode())
        except UnicodeDecodeError:
            return None if self.sentencepiece else self._write(wanted)

    def _write(self, wanted: bytes) -> str:
        if self.sentencepiece:
            return wanted.decode().replace(" ", SPACE)
        return "".join(BYTE_LEVEL[byte] for byte in wanted)


def bytes_of(entry: str) -> bytes:
    """What an entry of a byte-level vocabulary stands for."""
    return bytes(BYTE_OF.get(x, 0) for x in entry)


def splits_character(entry: str) -> bool:
    """Whether a byte-level entry has a whole character, other than a space in front, and a part of another."""
    content = bytes_of(entry)
    text = content.decode(errors="ignore")
    return bool(text.strip()) and text.encode() != content
