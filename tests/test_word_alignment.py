"""Parallel text, its alignment against the formulas in plain loops, and trans-tokenization."""

import numpy as np
import pytest
import torch
from scipy.special import digamma
from translations import WORDS, sentences, student_id, two_vocabularies

from matt_fast.initializers import word_alignment
from matt_fast.initializers.transtokenizers import transtokenizer_mixtures
from matt_fast.initializers.word_alignment import align, encode


def random_pairs(number, seed=0):
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, 7, draw.integers(1, 9)), draw.integers(0, 5, draw.integers(1, 6))) for _ in range(number)]


def plain_align(pairs, iterations=5, tension=4.0, empty=0.08, concentration=0.01):
    """Dyer et al. (2013), sections 2 and 3, with a variational Bayes step for the table, as dictionaries."""
    choices = {}
    for source, target in pairs:
        for s in (None, *source):
            choices.setdefault(s, set()).update(target)
    table = {(s, t): 1.0 for s, found in choices.items() for t in found}
    for step in range(iterations + 1):
        counts = dict.fromkeys(table, 0.0)
        for source, target in pairs:
            m, n = len(source), len(target)
            for j, t in enumerate(target, 1):
                prior = [np.exp(-tension * abs(i / m - j / n)) for i in range(1, m + 1)]
                prior = [empty] + [(1 - empty) * p / sum(prior) for p in prior]
                scores = [p * table[s, t] for p, s in zip(prior, (None, *source), strict=True)]
                for score, s in zip(scores, (None, *source), strict=True):
                    counts[s, t] += score / sum(scores)
        if step < iterations:
            totals = {s: sum(counts[s, t] for t in found) for s, found in choices.items()}
            for s, t in table:
                total = totals[s] + concentration * len(choices[s])
                table[s, t] = np.exp(digamma(counts[s, t] + concentration) - digamma(total))
    return {pair: count for pair, count in counts.items() if pair[0] is not None}


def as_dictionary(links):
    return {(int(s), int(t)): c for s, t, c in zip(*links, strict=True)}


@pytest.mark.parametrize("number", [1, 2, 60])
def test_counts_follow_the_model(number, monkeypatch):
    pairs = random_pairs(number)
    expected = plain_align(pairs)
    found = align(*zip(*pairs, strict=True))
    assert as_dictionary(found) == pytest.approx({p: c for p, c in expected.items() if c > 0}, rel=1e-9, abs=1e-12)
    assert found.counts.sum() <= sum(len(target) for _, target in pairs)
    monkeypatch.setattr(word_alignment, "CELLS", 50)
    assert as_dictionary(align(*zip(*pairs, strict=True))) == pytest.approx(as_dictionary(found), rel=1e-9, abs=1e-12)
    again = align(*zip(*pairs, strict=True))
    for one, two in zip(again, align(*zip(*pairs, strict=True)), strict=True):
        assert np.array_equal(one, two)


def test_a_dictionary_is_found():
    """Five words, each translated by its own, in random order."""
    draw = np.random.default_rng(0)
    sources = [draw.permutation(5)[: draw.integers(2, 5)] for _ in range(200)]
    targets = [draw.permutation(source) + 10 for source in sources]
    links = align(sources, targets, tension=0.0)
    right = links.sources + 10 == links.targets
    assert links.counts[right].sum() > 0.85 * sum(map(len, targets))
    for source in range(5):
        mine = links.sources == source
        assert links.targets[mine][links.counts[mine].argmax()] == source + 10


def test_empty_and_long_sides_are_left_out():
    pairs = random_pairs(20)
    nothing, long = np.zeros(0, np.int64), np.zeros(201, np.int64)
    more = [*pairs, (nothing, pairs[0][1]), (pairs[0][0], nothing), (nothing, nothing), (long, pairs[0][1])]
    expected, found = (align(*zip(*some, strict=True)) for some in (pairs, more))
    for one, two in zip(expected, found, strict=True):
        assert np.array_equal(one, two)
    with pytest.raises(ValueError, match="parallel: wanted a pair with 1 to 200 tokens on both sides, got none"):
        align([nothing, long], [pairs[0][1]] * 2)
    with pytest.raises(ValueError, match="targets: wanted one for each of the 2 sources, got 1"):
        align([nothing, long], [nothing])


def test_encoding_leaves_out_special_tokens():
    vocabulary = two_vocabularies(sentences(50))
    kept = [i for i, token in vocabulary.tokens.items() if token.kind != "special"]
    found, nothing = encode(vocabulary.student, ["<s>ein Haus<new>", ""], kept)
    assert vocabulary.student.decode(found) == "ein Haus"
    assert len(nothing) == 0
    assert encode(vocabulary.student, [], kept) == []


def test_transtokenizers_mix_what_translates():
    pairs = sentences(300)
    vocabulary = two_vocabularies(pairs)
    found = transtokenizer_mixtures(pairs, vocabulary)
    assert set(found.ids.tolist()) <= set(vocabulary.tokens) - set(vocabulary.matches)
    table = torch.eye(vocabulary.teacher_rows)
    rows = dict(zip(found.ids.tolist(), found.rows(table), strict=True))
    for source, target in WORDS.items():
        (teacher_id,) = vocabulary.teacher(" " + source)["input_ids"][1:]
        best = rows[student_id(vocabulary, " " + target)].argmax()
        assert best == teacher_id, (source, vocabulary.teacher.decode(best))
    torch.testing.assert_close(torch.stack(list(rows.values())).sum(1), torch.ones(len(rows)))
    # By the definition: expected counts of at least 10, of tokens that are not special, divided by their sum.
    encoded = [
        (vocabulary.teacher(s, add_special_tokens=False)["input_ids"], vocabulary.student(t)["input_ids"][1:])
        for s, t in pairs
    ]
    counts = plain_align(encoded)
    for token_id, row in rows.items():
        kept = {s: c for (s, t), c in counts.items() if t == token_id and c >= 10}
        expected = torch.zeros(vocabulary.teacher_rows)
        expected[list(kept)] = torch.tensor(list(kept.values()), dtype=torch.float32) / sum(kept.values())
        torch.testing.assert_close(row, expected)


def test_what_has_no_translation_is_left_to_the_caller():
    pairs = sentences(300)
    vocabulary = two_vocabularies(pairs)
    strange = [("<bos> 2023 x § a", "<s> 2023        x §§ ein ©<new>")] * 30
    found = transtokenizer_mixtures([*pairs, *strange, ("only", ""), ("", "nur")], vocabulary)
    absent = set(vocabulary.tokens) - set(vocabulary.matches) - set(found.ids.tolist())
    for text in (" 2023", "       ", " §§", " Zwerg"):
        assert student_id(vocabulary, text) in absent
    assert vocabulary.student.convert_tokens_to_ids("<new>") in absent
    fragments = [i for i, token in vocabulary.tokens.items() if b"\xc2" in token.bytes and i not in vocabulary.matches]
    assert absent.issuperset(fragments)
    targets = [t for _, t in [*pairs, *strange]]
    seen = {i for ids in vocabulary.student(targets)["input_ids"] for i in ids}
    special = {i for i, token in vocabulary.tokens.items() if token.kind == "special"}
    assert sum(int(found.counts[i]) == 0 for i in absent) == len(absent - (seen - special)) > 0
    with pytest.raises(ValueError, match="parallel: wanted a pair with 1 to 200 tokens"):
        transtokenizer_mixtures([], vocabulary)
