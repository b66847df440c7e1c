"""Merges learned on top of a tokenizer's own tokens, by the BPE trainer of `tokenizers`.

Each token of the base is written as one character, so that the trainer, which begins with characters, begins with the
base's tokens. What it learns are merges of tokens, in the order in which they must stand behind the base's own.
"""

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache

import numpy as np
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers, trainers

from matt_fast.alignment.vocabulary import BYTE_OF, BYTE_TOKEN
from matt_fast.support.texts import bounded_pieces, groups
from matt_fast.tokenizers.source import Source
from matt_fast.tokenizers.spelling import bytes_of, splits_character

UTF_32 = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
FIRST = 0x20000  # the character of token 0: from here on none is white space
CHARACTERS = 0x33000  # Unicode's letters and signs lie below it
TOGETHER = 64  # texts
MOST_WORDS = 1 << 21  # different pre-tokens held at a time
REPEATED = 1 << 16  # characters given to the trainer at a time
MIN_COUNT = 2  # of a pair that is merged
COVERAGE = 0.9995  # of the characters of a text, as in SentencePiece
DIGITS = frozenset("0123456789")
BLANK, LETTER, DIGIT, SPACE, OTHER = range(5)  # classes of characters


class Symbols:
    """A tokenizer's tokens as characters, "symbols", and where none may be merged with the next.

    That is between pre-tokens, and at added and unknown tokens; at digits too, if the base keeps each alone. A
    SentencePiece vocabulary does not say where its trainer split texts: there merges stay inside words, as the
    trainer's do, and do not mix letters, digits and signs.

    Args:
        source: the base. Ids are below 700,000.
        digits_alone: whether digits are merged with nothing; as in the base if None.

    Attributes:
        named: symbols that stand for entries that are not the base's, see `name`.
    """

    def __init__(self, source: Source, digits_alone: bool | None = None):
        entries, added = source.entries, {token["content"] for token in source.backend["added_tokens"]}
        self.rows = max(entries.values()) + 1
        if FIRST + self.rows + CHARACTERS > 0x110000:
            raise ValueError(f"{source.argument}: wanted ids below 700,000, got {self.rows - 1:,}")
        model = source.backend["model"]
        unknown = model.get("unk_token") if "unk_id" not in model else list(entries)[model["unk_id"] or 0]
        self.encoder, self.entry_of = source.plain, {i: entry for entry, i in entries.items()}
        self.barrier = np.zeros(self.rows, bool)
        self.barrier[[i for entry, i in entries.items() if entry in added or entry == unknown]] = True
        if keeps_digits_alone(source) if digits_alone is None else digits_alone:
            self.barrier[[i for entry, i in entries.items() if entry in DIGITS]] = True
        self.byte = np.full(self.rows, -1)
        if model.get("byte_fallback"):
            for entry, i in entries.items():
                if byte := BYTE_TOKEN.fullmatch(entry):
                    self.byte[i] = int(byte[1], 16)
        self.named: dict[str, str] = {}
        self.inside_words = source.sentencepiece
        if self.inside_words:
            self._classify(entries)

    def _classify(self, entries: dict[str, int]) -> None:
        self.leads, self.blank, self.one_blank = (np.zeros(self.rows + CHARACTERS, bool) for _ in range(3))
        self.first, self.last = (np.full(self.rows + CHARACTERS, OTHER, np.uint8) for _ in range(2))
        for entry, i in entries.items():
            bare = entry.lstrip("▁")
            self.leads[i], self.blank[i], self.one_blank[i] = bare != entry, not bare, entry == "▁"
            if bare:
                self.first[i], self.last[i] = character_class(bare[0]), character_class(bare[-1])
        own = [character_class(chr(i)) for i in range(CHARACTERS)]
        self.first[self.rows :] = self.last[self.rows :] = own

    def words(self, encoding: Encoding) -> tuple[str, np.ndarray]:
        """(pre-tokens of two symbols or more, separated by spaces; code points of the characters in bytes)."""
        ids, word = np.array(encoding.ids, np.int64), np.array(encoding.word_ids, np.int64)
        if not len(ids):
            return "", ids
        symbols, barrier, characters = ids, self.barrier[ids], ids[:0]
        bytes_ = self.byte[ids]
        if (bytes_ >= 0).any():
            symbols, keep = self._with_characters(ids, bytes_)
            characters = symbols[symbols >= self.rows] - self.rows
            barrier |= (bytes_ >= 0) & (symbols < self.rows)
            symbols, word, barrier = symbols[keep], word[keep], barrier[keep]
        cut = np.ones(len(symbols) + 1, bool)
        cut[1:-1] = (word[1:] != word[:-1]) | barrier[1:] | barrier[:-1]
        if self.inside_words:
            cut[1:-1] |= self._between_words(symbols[:-1], symbols[1:])
        alone = cut[:-1] & cut[1:]
        symbols, cut = symbols[~alone], cut[:-1][~alone]
        text = np.full(len(symbols) + cut.sum(), ord(" "), np.uint32)
        text[np.arange(len(symbols)) + np.cumsum(cut)] = symbols + FIRST
        return text.tobytes().decode(UTF_32), characters

    def _with_characters(self, ids: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Symbols with that of its character at each first byte of several, and which symbols stay."""
        symbols = ids.copy()
        follows = (value & 0xC0 == 0x80) & (value >= 0)
        padded = np.concatenate([value, np.zeros(3, value.dtype)]) & 0x3F
        second, third, fourth = (padded[i : i + len(value)] for i in (1, 2, 3))
        for low, high, code in (
            (0xC2, 0xE0, (value & 0x1F) << 6 | second),
            (0xE0, 0xF0, (value & 0x0F) << 12 | second << 6 | third),
            (0xF0, 0xF5, (value & 0x07) << 18 | second << 12 | third << 6 | fourth),
        ):
            here = (value >= low) & (value < high) & (code < CHARACTERS)
            symbols[here] = self.rows + code[here]
        return symbols, ~follows

    def _between_words(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        new_word = self.leads[right] & ~(self.blank[left] & self.blank[right])
        mixed = np.where(self.blank[left], ~self.one_blank[left], self.last[left] != self.first[right])
        return new_word | (~self.leads[right] & mixed)

    def spell(self, symbol: str) -> str:
        """How the vocabulary writes a symbol."""
        if symbol in self.named:
            return self.named[symbol]
        i = ord(symbol) - FIRST
        return self.entry_of[i] if i < self.rows else chr(i - self.rows)

    def spell_all(self, symbols: str) -> str:
        return "".join(map(self.spell, symbols))

    def name(self, entry: str) -> str:
        """A symbol for an entry that is appended to a byte-level vocabulary."""
        symbol = chr(FIRST + self.rows + len(self.named))
        self.named[symbol] = entry
        return symbol

    def units(self, word: str) -> list[str]:
        """A pre-token of a byte-level vocabulary, cut into the shortest runs of symbols that have whole characters."""
        units: list[str] = []
        for symbol in word:
            if units and BYTE_OF.get(self.spell(symbol)[0], 0) & 0xC0 == 0x80:
                units[-1] += symbol
            else:
                units.append(symbol)
        return units


def keeps_digits_alone(source: Source) -> bool:
    """Whether no token has a digit and something else, but for added tokens."""
    added = {token["content"] for token in source.backend["added_tokens"]}
    rest = (x for x in source.entries if DIGITS.intersection(x) and x not in added and not BYTE_TOKEN.fullmatch(x))
    return all(len(entry) == 1 for entry in rest)


@cache
def character_class(character: str) -> int:
    if character == "▁":
        return BLANK
    category = unicodedata.category(character)
    if character.isspace():
        return SPACE
    return {"L": LETTER, "M": LETTER, "N": DIGIT}.get(category[0], OTHER)


def count_words(symbols: Symbols, texts: Iterable[str]) -> tuple[Counter, Counter]:
    """(pre-token of two symbols or more -> times, character that the vocabulary lacks -> times).

    Of more than 2 million different pre-tokens the rarest are dropped, down to a million. In a language without spaces
    most occur once.
    """
    words, characters = Counter(), Counter()
    for group in groups(filter(None, bounded_pieces(texts)), TOGETHER):
        for encoding in symbols.encoder.encode_batch(group, add_special_tokens=False):
            text, missing = symbols.words(encoding)
            words.update(text.split())
            codes, times = np.unique(missing, return_counts=True)
            characters.update(dict(zip(map(chr, codes), times.tolist(), strict=True)))
        while len(words) > MOST_WORDS:
            words = Counter(dict(_most_frequent(words, MOST_WORDS // 2)))
    return words, characters


def _most_frequent(words: Counter, most: int) -> Iterator[tuple[str, int]]:
    """So many words; of those that are as frequent as the last the earliest."""
    least = sorted(words.values())[len(words) - most]
    room = most - sum(times > least for times in words.values())
    for word, times in words.items():
        room -= times == least
        if times > least or (times == least and room >= 0):
            yield word, times


def learn(
    symbols: Symbols, texts: Iterable[str], wanted: int, max_characters: int | None = None
) -> tuple[list[str], list[tuple[str, str]]]:
    """The entries to append to a vocabulary, and the merges that make them.

    Every merge makes an entry that was not there, so that texts in which none of the new entries occurs keep their
    tokens. Characters that the vocabulary lacks (a byte fallback spells them) come first, up to 99.95% of the text's
    characters that it lacks, and take half of the new entries at most. In a byte-level vocabulary an entry is whole
    characters, or a part of one.

    Args:
        symbols: of the base.
        texts: to learn from.
        wanted: entries, at most; fewer where no pair of tokens occurs twice any more.
        max_characters: of an entry; "▁" and each byte of a byte-level vocabulary is one.
    """
    words, missing = count_words(symbols, texts)
    characters = _covering(missing, wanted // 2)
    room = wanted - len(characters)
    entries, merges = _merged(symbols, words, room, characters, max_characters)
    if not symbols.inside_words and any(map(splits_character, entries)):
        entries, merges = _merged_by_character(symbols, words, room, entries, max_characters)
    return characters + entries, merges


def _merged(
    symbols: Symbols, words: Counter, room: int, appended: list[str], max_characters: int | None
) -> tuple[list[str], list[tuple[str, str]]]:
    """As many new entries as there is room for, and their merges."""
    slack = room // 8 + 64
    alphabet = len(set().union(*words)) if words else 0
    while True:
        tried = _train(words, alphabet + room + slack)
        entries, merges = _accepted(symbols, tried, appended, max_characters)
        if len(entries) >= room or len(tried) < room + slack:
            return entries[:room], merges[:room]
        slack *= 4


def _merged_by_character(
    symbols: Symbols, words: Counter, room: int, free: Collection[str], max_characters: int | None
) -> tuple[list[str], list[tuple[str, str]]]:
    """The same where no new entry has a whole character and a part of another.

    Characters that the base spells with several tokens are put together first, those that merges without this bound
    (`free`) put together too. All others stay as they are.
    """
    made = set().union(*map(_whole_characters, free))
    several: Counter[str] = Counter()
    for word, times in words.items():
        for unit in symbols.units(word):
            if len(unit) > 1:
                several[unit] += times
    wanted = {unit: entry for unit in several if _whole_characters(entry := symbols.spell_all(unit)) & made}
    characters, merges = _merged(symbols, Counter({x: several[x] for x in wanted}), room, [], max_characters)
    reached = set(characters)
    names = {unit: symbols.name(entry) for unit, entry in wanted.items() if entry in reached}
    rest: Counter[str] = Counter()
    for word, times in words.items():
        units = (names.get(unit, unit) for unit in symbols.units(word))
        for part in "".join(unit if len(unit) == 1 else " " for unit in units).split():
            rest[part] += times
    entries, behind = _merged(symbols, rest, room - len(characters), characters, max_characters)
    return characters + entries, merges + behind


def _whole_characters(entry: str) -> set[str]:
    """The characters of which a byte-level entry has all bytes, the first with the space in front of it."""
    text = bytes_of(entry).decode(errors="ignore")
    return {text[:2], *text[2:]} if text[:1] == " " else set(text)


def _covering(missing: Counter, most: int) -> list[str]:
    """The most frequent characters, until nearly all occurrences are covered."""
    left, covered, chosen = missing.total(), 0, []
    for character, times in sorted(missing.items(), key=lambda item: (-item[1], item[0])):
        if len(chosen) == most or times < MIN_COUNT or covered >= COVERAGE * left:
            break
        chosen.append(character)
        covered += times
    return chosen


def _train(words: Counter, size: int) -> list[list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=MIN_COUNT, show_progress=False)
    tokenizer.train_from_iterator(_repeated(words), trainer)
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _repeated(words: Counter) -> Iterator[str]:
    """Each word as often as it occurs: the trainer counts for itself."""
    waiting, size = [], 0
    for word, times in words.items():
        while times:
            now = min(times, REPEATED // (len(word) + 1) + 1)
            waiting.append((word + " ") * now)
            size += len(waiting[-1])
            times -= now
            if size >= REPEATED:
                yield "".join(waiting)
                waiting, size = [], 0
    yield "".join(waiting)


def _accepted(
    symbols: Symbols, tried: Iterable[list[str]], characters: list[str], max_characters: int | None
) -> tuple[list[str], list[tuple[str, str]]]:
    """What can stand in the vocabulary: both parts are there, and the entry is not.

    Without a merge no token loses the merges that lead to it: those were the only ones that applied inside it.
    """
    known = {*symbols.entry_of.values(), *characters}
    spelled: dict[str, str] = {}
    entries, merges = [], []

    def part(symbol: str) -> str | None:
        if len(symbol) > 1:
            return spelled.get(symbol)
        entry = symbols.spell(symbol)
        return entry if entry in known else None

    for left, right in tried:
        pair = part(left), part(right)
        if None in pair:
            continue
        entry = "".join(pair)
        if entry in known or (max_characters is not None and len(entry) > max_characters):
            continue
        known.add(entry)
        spelled[left + right] = entry
        entries.append(entry)
        merges.append(pair)
    return entries, merges
