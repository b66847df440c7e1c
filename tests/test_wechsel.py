"""WECHSEL: words, dictionary, rotation and mixtures against plain loops, scipy and a small world in two languages."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from tiny import new_tokenizer, save_tiny_model
from translations import WORDS, sentences, student_id, two_vocabularies

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import initial_rows, wechsel
from matt_fast.initializers.wechsel import (
    WordVectors,
    dictionary_from_pairs,
    procrustes,
    subword_vectors,
    train_word_vectors,
    wechsel_mixtures,
)
from matt_fast.model.teacher import Teacher

PAIRS = sentences(300)
SMALL = {"dim": 8, "epochs": 1}


@pytest.fixture(scope="module")
def vocabulary():
    return two_vocabularies(PAIRS)


@pytest.fixture(scope="module")
def words():
    """The words of both sides; the vectors of the second are those of the first, turned, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(WORDS) + 2, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    counts = torch.randint(1, 50, (len(vectors),), generator=generator)
    noise = 0.01 * torch.randn(vectors.shape, generator=generator)
    source = WordVectors([*WORDS, "a", "."], vectors, counts)
    target = WordVectors([*WORDS.values(), "ein", "."], vectors @ turn + noise, counts)
    return source, target


def plain_subwords(tokenizer, words):
    """{id: (sum of vectors by counts, sum of counts)}: a word once for each of its tokens, with a space and without."""
    found = {}
    for word, vector, count in zip(words.words, words.vectors.double(), words.counts.tolist(), strict=True):
        for text in (word, " " + word):
            for token_id in set(tokenizer(text, add_special_tokens=False)["input_ids"]) - set(
                tokenizer.all_special_ids
            ):
                total, number = found.get(token_id, (0, 0))
                found[token_id] = total + count * vector, number + count
    return found


def test_subwords_are_means_of_words(vocabulary, words):
    for tokenizer, tokens, side in zip(
        (vocabulary.teacher, vocabulary.student), (vocabulary.teacher_tokens, vocabulary.tokens), words, strict=True
    ):
        vectors, totals = subword_vectors(tokenizer, tokens, side)
        expected = plain_subwords(tokenizer, side)
        assert set(vectors.any(1).nonzero()[:, 0].tolist()) == set(expected)
        for token_id, (total, number) in expected.items():
            assert totals[token_id] == number
            torch.testing.assert_close(vectors[token_id], total / number)


def test_rotation_is_scipys(words):
    source, target = (side.vectors for side in words)
    turn = procrustes(source, target)
    expected, _ = orthogonal_procrustes(source.double().numpy(), target.double().numpy())
    np.testing.assert_allclose(turn, expected, atol=1e-9)
    torch.testing.assert_close(turn @ turn.T, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("neighbors", [1, 3, 1000])
def test_mixtures_follow_the_definition(vocabulary, words, neighbors):
    source, target = words
    dictionary = [*WORDS.items(), ("unknown", "Haus"), ("house", "unbekannt")]
    found = wechsel_mixtures(vocabulary, source, target, dictionary, neighbors=neighbors, temperature=0.2)
    used = torch.arange(len(WORDS))
    turn, _ = orthogonal_procrustes(source.vectors[used].double().numpy(), target.vectors[used].double().numpy())
    theirs = {i: total.numpy() / n @ turn for i, (total, n) in plain_subwords(vocabulary.teacher, source).items()}
    ours = {i: total.numpy() / n for i, (total, n) in plain_subwords(vocabulary.student, target).items()}
    rows = dict(zip(found.ids.tolist(), found.rows(torch.eye(vocabulary.teacher_rows)), strict=True))
    assert rows
    for token_id, row in rows.items():
        vector = ours[token_id]
        cosines = {i: v @ vector / np.linalg.norm(v) / np.linalg.norm(vector) for i, v in theirs.items()}
        nearest = sorted(cosines, key=cosines.get, reverse=True)[:neighbors]
        weights = {i: np.exp(cosines[i] / 0.2) for i in nearest}
        # Tokens of the same words are equally near: which of them are taken is no matter.
        expected = np.array(sorted(weights.values(), reverse=True)) / sum(weights.values())
        np.testing.assert_allclose(row[row > 0].sort(descending=True).values, expected, rtol=1e-4, atol=1e-6)
        least = min(cosines[i] for i in nearest)
        assert all(cosines[i] >= least - 1e-5 for i in row.nonzero()[:, 0].tolist())
    new = set(vocabulary.tokens) - set(vocabulary.matches)
    letters = {i for i in new if vocabulary.tokens[i].kind == "text" and vocabulary.tokens[i].bytes.isalpha()}
    assert new & set(ours) >= set(rows) >= letters & set(ours)
    assert all((int(found.counts[i]) == 0) == (i not in ours) for i in new - set(rows))
    for text in (" 2023", "       ", " §§", " Zwerg"):
        assert student_id(vocabulary, text) in new - set(rows)
    if neighbors > 3:  # else another of two equally near tokens may be taken
        blocks = wechsel_mixtures(
            vocabulary, source, target, dictionary, neighbors=neighbors, temperature=0.2, block_bytes=1
        )
        table = torch.randn(vocabulary.teacher_rows, 5)
        torch.testing.assert_close(blocks.rows(table), found.rows(table))


def test_translations_are_nearest(vocabulary, words):
    found = wechsel_mixtures(vocabulary, *words, list(WORDS.items()))
    rows = dict(zip(found.ids.tolist(), found.rows(torch.eye(vocabulary.teacher_rows)), strict=True))
    for source, target in WORDS.items():
        (teacher_id,) = vocabulary.teacher(" " + source)["input_ids"][1:]
        row = rows[student_id(vocabulary, " " + target)]
        assert row[teacher_id] == row.max()


def test_dictionary_of_parallel_text():
    found = dictionary_from_pairs(PAIRS)
    assert set(found) == {*WORDS.items(), ("a", "ein"), (".", ".")}
    assert dictionary_from_pairs([*PAIRS, ("once", "einmal")]) == found
    with pytest.raises(ValueError, match="parallel: wanted a pair with 1 to 200 tokens on both sides, got none"):
        dictionary_from_pairs(PAIRS[:4])


def test_word_vectors_are_deterministic_and_without_the_unknown():
    texts = [f"{target} 42, {target.upper()}x <unknown>" for _, target in PAIRS] + ["", "einmal"]
    one = train_word_vectors(texts, **SMALL)
    two = train_word_vectors(iter(texts), **SMALL)
    assert one.words == two.words
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, train_word_vectors(texts, seed=1, **SMALL).vectors)
    assert set(WORDS.values()) | {"ein", ".", ",", "42"} <= set(one.words)
    assert "einmal" not in one.words
    assert not any(word == wechsel.UNKNOWN or " " in word for word in one.words)
    assert one.counts[one.words.index("ein")] == 300
    with pytest.raises(ValueError, match="texts: wanted a token with 5 occurrences"):
        train_word_vectors(["once"])


def test_bad_arguments_are_named(vocabulary, words):
    source, target = words
    with pytest.raises(ValueError, match="source, target: wanted vectors of one dimension, got 12 and 11"):
        wechsel_mixtures(vocabulary, source, target._replace(vectors=target.vectors[:, :11]), list(WORDS.items()))
    with pytest.raises(
        ValueError, match="dictionary: wanted a pair of words with vectors on both sides, got none in 1"
    ):
        wechsel_mixtures(vocabulary, source, target, [("x", "Haus")])


@pytest.mark.parametrize("init", ["wechsel", "transtokenizers", "tokalign"])
def test_rows_of_a_model(tmp_path, init):
    """Shared rows as they are, those with a mixture changed, the rest as the mean; the same again."""
    tokenizer = save_tiny_model(tmp_path / "teacher")
    teacher = Teacher(tmp_path / "teacher").load(torch.float32)
    vocabulary = VocabularyPair(tokenizer, new_tokenizer(), 275)
    texts = [f"def function_alpha self.{target}" for _, target in PAIRS]
    pairs = [(f"def function_alpha {source}", f"def function_alpha self.{target}") for source, target in PAIRS]
    given = {"texts": texts} if init == "tokalign" else {"texts": texts, "parallel": pairs}
    rows = initial_rows(teacher, vocabulary, init, seed=0, **given).input
    plain = initial_rows(teacher, vocabulary, "mean", seed=0).input
    weight = teacher.get_input_embeddings().weight
    shared = list(vocabulary.matches)
    assert torch.equal(rows[shared], weight[[vocabulary.matches[i].teacher_id for i in shared]])
    changed = (rows != plain).any(1).nonzero()[:, 0].tolist()
    assert 0 < len(changed) < len(vocabulary.tokens) - len(shared)
    assert all(any(c.isalpha() for c in vocabulary.tokens[i].bytes.decode()) for i in changed)
    assert rows.isfinite().all()
    assert torch.equal(rows, initial_rows(teacher, vocabulary, init, seed=0, **given).input)
    argument, what = ("texts", "text to count") if init == "tokalign" else ("parallel", "pairs of texts")
    with pytest.raises(ValueError, match=f"{argument}: wanted {what} .* for init '{init}', got none"):
        initial_rows(teacher, vocabulary, init, seed=0)
