"""A small world in two languages: sentences whose words translate one to one, and tokenizers for both."""

import random

from tiny import byte_level

from matt_fast.alignment.vocabulary import VocabularyPair

WORDS = {
    "house": "Haus",
    "book": "Buch",
    "tree": "Baum",
    "garden": "Garten",
    "mouse": "Maus",
    "window": "Fenster",
    "small": "kleines",
    "large": "großes",
    "old": "altes",
    "green": "grünes",
    "seems": "scheint",
    "stands": "steht",
    "here": "hier",
    "today": "heute",
}


def sentences(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Adjective noun verb adverb, and the adverb somewhere else in the translation."""
    draw = random.Random(seed)
    words = list(WORDS)
    pairs = []
    for _ in range(number):
        noun, adjective = draw.choice(words[:6]), draw.choice(words[6:10])
        verb, adverb = draw.choice(words[10:12]), draw.choice(words[12:])
        target = [WORDS[word] for word in (adjective, noun, verb, adverb)]
        if draw.random() < 0.3:
            target = [target[3], target[2], *target[:2]]
        pairs.append((f"a {adjective} {noun} {verb} {adverb} .", f"ein {' '.join(target)} ."))
    return pairs


def two_vocabularies(pairs: list[tuple[str, str]]) -> VocabularyPair:
    """The teacher knows the first language, the student the second, digits, spaces and a control token too."""
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    teacher = byte_level([source for source, _ in pairs], 340, **roles)
    more = ["2023 2023 2024 2024", "        x        x", "§§ §§ §§ ££ ££ ££", "Zwerg Zwerg Zwerg"] * 20
    student = byte_level([target for _, target in pairs] + more, 360, bos_token="<s>", unk_token="<new>")
    return VocabularyPair(teacher, student, len(teacher))


def student_id(vocabulary: VocabularyPair, text: str) -> int:
    (found,) = [i for i, token in vocabulary.tokens.items() if token.kind == "text" and token.bytes == text.encode()]
    return found
