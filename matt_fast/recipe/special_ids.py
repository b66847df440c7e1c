"""Token ids that configurations hold: which fields they are in, and what they become in a new vocabulary."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from matt_fast.alignment.vocabulary import ROLES, VocabularyPair

# The student's own token counts before the one that the teacher's becomes.
OWN = tuple(f"{role}_id" for role in ROLES)
STOP = "eos_token_id"  # the role that several tokens can have
# An id, or a list of ids: image_token_id, boi_token_index, image_start_id, pad_index ...
ID_FIELD = re.compile(
    r"(?:^|_)tok(?:en)?s?_(?:id|ids|index|indices|idx)$"
    r"|^(?:bos|eos|pad|unk|mask|cls|sep)_(?:id|index)$"
    r"|^(?:im|img|image|video|vision|audio|slice)(?:_\w+)?_(?:start|end|patch|newline|context|bos|eos|pad)_id$"
    r"|^newline_id$"
    r"|^(?:begin_)?suppress_tokens$"
)
MANY_IDS = ("bad_words_ids", "force_words_ids")  # lists of lists of ids
OTHER_VOCABULARY = re.compile(r"codec|codebook|t2u|blank|speaker|token_type")  # sounds, units, segments
BY_TOKEN = ("vocabulary_map",)  # names and ids of the tokens that images are made of
SIZES = ("unpadded_vocab_size",)  # logits behind it are cut off
NO_TOKEN = -1  # for a field that wants a number; no token has it

Container = dict[str, Any] | PreTrainedConfig | GenerationConfig


def check_special_ids(config: PreTrainedConfig) -> None:
    """Raise a ValueError if a configuration lists the tokens of a vocabulary in a way that cannot be carried over."""
    for where, part in _parts(config, "config.json"):
        for name in BY_TOKEN:
            if _get(part, name):
                raise ValueError(
                    f"model: wanted one whose vocabulary can be replaced, but its configuration lists tokens by name "
                    f"and id ({where}: {name}), of which its images are made"
                )


def update_special_ids(model: PreTrainedModel, vocabulary: VocabularyPair) -> list[str]:
    """Translate the token ids in a model's configuration, its parts, and its generation configuration, in place.

    See `translate_ids`; returns what was dropped.
    """
    messages = translate_ids(model.config, vocabulary)
    generation = getattr(model, "generation_config", None)  # a decoder has one
    return messages if generation is None else messages + translate_ids(generation, vocabulary)


def translate_ids(config: Container, vocabulary: VocabularyPair, where: str | None = None) -> list[str]:
    """Translate all token ids in a configuration to the new vocabulary, in place, each once.

    The new tokenizer's own bos, eos, pad, cls, sep, mask and unk ids come first; generation ends with another eos of
    the model's too. All others become those of the same student tokens. An id without one is dropped: from its list, or
    it becomes None, or -1 in a field that wants a number (of an image's tokens, say). Parts that have a vocabulary of
    their own, such as a decoder of sounds, are left alone.

    Args:
        config: of a model with its parts, of generation, or the content of a JSON file.
        vocabulary: the two vocabularies.
        where: the file that messages name; the usual one if None.

    Returns:
        a line for each field in which something was dropped.
    """
    usual = "generation_config.json" if isinstance(config, GenerationConfig) else "config.json"
    translation = _Translation(vocabulary, isinstance(config, GenerationConfig))
    parts = list(_parts(config, where or usual, vocabulary.teacher_rows))
    return [line for place, part in parts for line in translation.fields(part, place)]


class _Translation:
    def __init__(self, vocabulary: VocabularyPair, generation: bool):
        self.student, self.rows, self.generation = vocabulary.student, vocabulary.rows, generation
        self.names = {i: token for token, i in vocabulary.teacher.get_vocab().items()}
        self.student_of: dict[int, int] = {}
        for student_id, match in sorted(vocabulary.matches.items(), key=lambda item: item[1].how != "bytes"):
            self.student_of.setdefault(match.teacher_id, student_id)

    def fields(self, part: Container, where: str) -> Iterator[str]:
        for name in _names(part):
            old = _get(part, name)
            new, dropped = self.field(name, old)
            if new is not old:
                _set(part, name, new)
            if dropped:
                tokens = ", ".join(sorted({self.name_of(i) for i in dropped})[:5])
                more = f" and {len(set(dropped)) - 5} more" if len(set(dropped)) > 5 else ""
                yield f"{where}: {name}: dropped {tokens}{more}, which the new tokenizer does not have"

    def field(self, name: str, old: Any) -> tuple[Any, list[int]]:
        """The new value, and the ids that have none."""
        if name in OWN:
            return self.role(name, old)
        if name in SIZES:
            return old and self.rows, []
        if OTHER_VOCABULARY.search(name) or (not old and old != 0):
            return old, []
        if name == "forced_decoder_ids":  # position, id
            kept = [[place, self.student_of.get(i)] for place, i in old if i is None or i in self.student_of]
            return kept, [i for _, i in old if i is not None and i not in self.student_of]
        if name == "sequence_bias":
            return self.biases(old)
        if name in MANY_IDS:
            return self.sequences(old)
        if name.endswith("_to_id") and isinstance(old, dict):  # languages and tasks of a speech model
            known = {key: self.student_of[i] for key, i in old.items() if i in self.student_of}
            return known, [i for i in old.values() if i not in self.student_of]
        if not ID_FIELD.search(name):
            return old, []
        if isinstance(old, list | tuple):
            return self.ids(old)
        if not isinstance(old, int) or isinstance(old, bool) or old < 0:
            return old, []
        if old in self.student_of:
            return self.student_of[old], []
        optional = self.generation or name.startswith(("forced_", "decoder_"))
        return None if optional else NO_TOKEN, [old]

    def role(self, name: str, old: Any) -> tuple[Any, list[int]]:
        own = getattr(self.student, name)
        given = old if isinstance(old, list | tuple) else [old] if isinstance(old, int) and old >= 0 else []
        kept, dropped = self.ids(given)
        if own is not None:
            kept = list(dict.fromkeys([own, *kept]))
        if isinstance(old, list | tuple):
            return kept, dropped
        if name == STOP and self.generation and len(kept) > 1:  # what the model learned to end with still ends a text
            return kept, []
        return (kept[0], []) if kept else (None, dropped)

    def ids(self, old: list[int]) -> tuple[list[int], list[int]]:
        kept = dict.fromkeys(self.student_of[i] for i in old if i in self.student_of)
        return list(kept), [i for i in old if i not in self.student_of and i >= 0]

    def sequences(self, old: list) -> tuple[list, list[int]]:
        """Lists of ids, or lists of such: one with an id that has none is dropped as a whole."""
        kept, dropped = [], []
        for entry in old:
            if entry and isinstance(entry[0], list | tuple):
                new, missing = self.sequences(entry)
                kept += [new] if new else []
                dropped += missing
            elif missing := [i for i in entry if i not in self.student_of]:
                dropped += missing
            else:
                kept.append([self.student_of[i] for i in entry])
        return kept or None, dropped

    def biases(self, old: dict | list) -> tuple[dict | list | None, list[int]]:
        pairs = list(old.items()) if isinstance(old, dict) else [tuple(pair) for pair in old]
        kept, dropped = [], []
        for ids, bias in pairs:
            new, missing = self.sequences([list(ids)])
            kept += [] if new is None else [[new[0], bias]]
            dropped += missing
        if isinstance(old, dict):
            return {tuple(ids): bias for ids, bias in kept} or None, dropped
        return kept or None, dropped

    def name_of(self, i: int) -> str:
        return repr(self.names[i]) if i in self.names else f"the id {i}"


def _parts(config: Container, where: str, rows: int | None = None) -> Iterator[tuple[str, Container]]:
    """A configuration and those in it, each once, but for parts with another vocabulary than the one of `rows`."""
    main, seen, text = None, set(), set()
    if isinstance(config, PreTrainedConfig):
        main = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        text = {id(config), id(config.get_text_config(decoder=True))}

    def walk(part: Container, place: str) -> Iterator[tuple[str, Container]]:
        own = part.get("vocab_size") if isinstance(part, Mapping) else getattr(part, "vocab_size", None)
        if id(part) in seen or (main is not None and own not in (None, main, rows) and id(part) not in text):
            return
        seen.add(id(part))
        yield place, part
        for name in _names(part):
            value = _get(part, name)
            if isinstance(value, PreTrainedConfig) or (isinstance(value, dict) and not name.endswith("_map")):
                yield from walk(value, f"{place}: {name}")

    yield from walk(config, where)


def _names(part: Container) -> list[str]:
    if isinstance(part, dict):
        return [name for name in part if isinstance(name, str)]
    aliases = getattr(part, "attribute_map", {})
    names = [*vars(part), *(name for name in OWN if hasattr(part, name))]
    return list(dict.fromkeys(name for name in names if not name.startswith("_") and name not in aliases))


def _get(part: Container, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)


def _set(part: Container, name: str, value: Any) -> None:
    if isinstance(part, dict):
        part[name] = value
    else:
        setattr(part, name, value)
