"""Short texts around tokens that a text does not have, or too seldom: the teacher writes them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.model.sampling import continuations
from matt_fast.support.texts import BROKEN, bounded_pieces, up_to

NEW = 32  # teacher tokens that are generated for a snippet, at most
SHORTEST = 4  # of them, at least
OPENING = 64  # characters before a token, at most
CHARACTERS = 1 << 20  # of the text that openings and words are taken from
WORDS, HOSTS = 1 << 16, 8  # that are looked at, and that are used of a token
TOGETHER = 1 << 12  # texts tokenised at a time
OPENED = {True: (True, False, True, True), False: (False, True, True, True)}  # the rounds, with text and without
BETWEEN = "\n\n"  # two snippets of a document


@dataclass(frozen=True)
class Snippet:
    """A text in which the student's tokenizer makes a token.

    Attributes:
        token: the student's id.
        text: of it.
        length: teacher tokens.
    """

    token: int
    text: str
    length: int


@dataclass(frozen=True)
class Snippets:
    """What the teacher wrote.

    Attributes:
        kept: snippets, by token and round.
        dropped: how many others did not have their token.
        generated: tokens that the teacher drew, for all of them.
    """

    kept: list[Snippet]
    dropped: int
    generated: int


def make_snippets(
    teacher: PreTrainedModel,
    vocabulary: VocabularyPair,
    wanted: Mapping[int, int],
    seed: int,
    *,
    texts: Iterable[str] = (),
    once: Callable[[str, Callable[[], list]], list] = lambda key, make: make(),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Snippets:
    """Let the teacher write texts in which new tokens occur.

    A snippet begins with the token's text, or with an opening before it: some words of `texts`, or of an earlier
    snippet where there are none; half of them each. A token that goes on within a word comes with a word that has it,
    from `texts` or the teacher's vocabulary, where there is one. The teacher goes on by sampling. Snippets in which the
    student's tokenizer does not make the token are dropped and tried again, four rounds in all. A special token gets
    none, nor one that no text is known to have. What is drawn for a token's snippet depends on the seed, the token and
    the snippet's number.

    Args:
        teacher: a causal language model.
        vocabulary: its vocabulary and the student's.
        wanted: student id -> how many snippets.
        seed: of all that is drawn.
        texts: text in the language or domain of the tokens, of which a million characters are read.
        once: of `continuations`, so that a call that is stopped need not draw all anew.
        on_progress: called with the snippets done, dropped ones too, and their number in this round.

    Raises:
        ValueError: the teacher is of a class that cannot generate.
    """
    text = "\n".join(up_to(bounded_pieces(texts), CHARACTERS))
    surfaces = _surfaces(vocabulary, list(wanted), text)
    start = start_of_text(vocabulary.teacher)
    special = [i for i, token in vocabulary.teacher_tokens.items() if token.kind == "special"]
    special = sorted({*special, *vocabulary.teacher.all_special_ids})
    usable = torch.zeros(vocabulary.teacher_rows, dtype=torch.bool)
    usable[[i for i in vocabulary.teacher_tokens if i < vocabulary.teacher_rows]] = True
    kept: list[Snippet] = []
    have, tried, generated = Counter(), Counter(), 0
    for number, opened in enumerate(OPENED[bool(text)]):
        missing = {i: wanted[i] - have[i] for i in sorted(surfaces) if wanted[i] > have[i]}
        if number == 0:  # the other half comes in the next round
            missing = {i: -(-count // 2) for i, count in missing.items()}
        tokens = [i for i, count in missing.items() for _ in range(count)]
        draws = []
        for i in tokens:
            draws.append(np.random.default_rng([seed, i, tried[i]]))
            tried[i] += 1
        pool = text or BETWEEN.join(x.text for x in kept)
        prompts = [
            _prompt(_opening(pool, draw) if opened else "", surfaces[i][draw.integers(len(surfaces[i]))])
            for i, draw in zip(tokens, draws, strict=True)
        ]
        if not tokens:
            continue
        encoded = vocabulary.teacher(prompts, add_special_tokens=False)["input_ids"]
        numbers = np.stack([draw.random(NEW) for draw in draws])
        options = {"ends": special, "shortest": SHORTEST, "once": once, "on_progress": on_progress}
        found = continuations(teacher, [[*start, *ids] for ids in encoded], numbers, usable, **options)
        written = [_decoded(vocabulary, [*before, *after]) for before, after in zip(encoded, found, strict=True)]
        for i, before, after, wrote in zip(tokens, encoded, found, written, strict=True):
            generated += len(after)
            if i in _ids(vocabulary, [wrote])[0]:
                have[i] += 1
                kept.append(Snippet(i, wrote, len(before) + len(after)))
    return Snippets(kept, sum(tried.values()) - len(kept), generated)


def as_documents(snippets: Iterable[Snippet], longest: int, seed: int) -> Iterator[list[Snippet]]:
    """Snippets in random order, as many together as have `longest` teacher tokens: a short row is mostly padding."""
    snippets = list(snippets)
    document: list[Snippet] = []
    for i in np.random.default_rng(seed).permutation(len(snippets)):
        if document and sum(x.length + 2 for x in [*document, snippets[i]]) > longest:  # 2 for what is between
            yield document
            document = []
        document.append(snippets[i])
    if document:
        yield document


def _surfaces(vocabulary: VocabularyPair, tokens: list[int], text: str) -> dict[int, list[str]]:
    """Texts in which the student's tokenizer makes a token, for each of `tokens` of which one is known."""
    wanted = {i: vocabulary.tokens[i] for i in tokens if vocabulary.tokens[i].kind != "special"}
    own = {i: token.bytes.decode(errors="ignore") for i, token in wanted.items()}
    own = {i: surface for i, surface in own.items() if surface.encode() == wanted[i].bytes and surface}
    found = {
        i: [surface]
        for (i, surface), ids in zip(own.items(), _ids(vocabulary, list(own.values())), strict=True)
        if i in ids
    }
    within = {i for i in wanted if i not in found or own[i][0].isalnum()}  # it goes on within a word, or may
    hosts: dict[int, list[str]] = {}
    words = list(_words(vocabulary, text)) if within else []
    for word, ids in zip(words, _ids(vocabulary, words), strict=True):
        for i in within.intersection(ids):
            if len(hosts.setdefault(i, [])) < HOSTS:
                hosts[i].append(word)
    return found | hosts


def _words(vocabulary: VocabularyPair, text: str) -> Iterator[str]:
    """Words with a space before them, of the text by how frequent they are, then of the teacher's vocabulary."""
    counts = Counter(re.findall(r"\w+", text))
    known = (token.bytes.decode(errors="ignore") for _, token in sorted(vocabulary.teacher_tokens.items()))
    words = [word for word, _ in counts.most_common(WORDS) if len(word) <= OPENING]  # not a line without spaces
    words += islice((x[1:] for x in known if re.fullmatch(r" \w\w+", x)), WORDS)
    return (f" {word}" for word in dict.fromkeys(words))


def _prompt(opening: str, surface: str) -> str:
    return opening + "\n" * (opening != "" and surface[0].isalnum()) + surface  # no word of two halves


def _opening(pool: str, draw: np.random.Generator) -> str:
    """Whole words of a text, up to OPENING characters of them; without white space behind them."""
    start = int(draw.integers(max(1, len(pool) - OPENING)))
    part = pool[start : start + OPENING]
    words = re.search(r"\s(\S.*\S|\S)\s", part, re.DOTALL)
    return words[1] if words else part.strip()


def _ids(vocabulary: VocabularyPair, texts: list[str]) -> list[list[int]]:
    found = []
    for first in range(0, len(texts), TOGETHER):
        found += vocabulary.student(texts[first : first + TOGETHER], add_special_tokens=False)["input_ids"]
    return found


def _decoded(vocabulary: VocabularyPair, ids: list[int]) -> str:
    text = vocabulary.teacher.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.partition(BROKEN)[0]  # up to bytes that are no character, or one that the last token left unfinished
