"""TokAlign: co-occurrence vectors and the nearest tokens against their definitions in plain loops."""

import numpy as np
import pytest
import torch
from tiny import TEXTS, byte_level, new_tokenizer

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import tokalign
from matt_fast.initializers.fasttext import TokenVectors
from matt_fast.initializers.tokalign import cooccurrence_vectors, tokalign_mixtures


def plain_information(texts, tokenizer, window, min_count):
    """{(i, j): positive pointwise mutual information} of tokens with `min_count` occurrences."""
    counts, beside = {}, {}
    for text in texts:
        ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i not in tokenizer.all_special_ids]
        for at, left in enumerate(ids):
            counts[left] = counts.get(left, 0) + 1
            for distance, right in enumerate(ids[at + 1 : at + 1 + window], 1):
                for key in ((left, right), (right, left)):
                    beside[key] = beside.get(key, 0) + 1 / distance
    beside = {key: c for key, c in beside.items() if all(counts[i] >= min_count for i in key)}
    totals = {}
    for (left, _), count in beside.items():
        totals[left] = totals.get(left, 0) + count
    total = sum(totals.values())
    return {key: max(0, np.log(c * total / (totals[key[0]] * totals[key[1]]))) for key, c in beside.items()}, counts


@pytest.mark.parametrize(("window", "min_count"), [(1, 1), (4, 3), (50, 2)])
def test_vectors_follow_the_definition(window, min_count):
    """With all directions kept, a vector's product with itself in the factorised matrix's absolute value is exact."""
    tokenizer = new_tokenizer()
    texts = ["", "a", *TEXTS, "<s> text <unk>"]
    found = cooccurrence_vectors(texts, tokenizer, dim=1000, window=window, min_count=min_count)
    information, counts = plain_information(texts, tokenizer, window, min_count)
    ids = sorted({i for key in information for i in key})
    assert found.ids.tolist() == ids
    assert {i: n for i, n in enumerate(found.counts.tolist()) if n} == counts
    place = {i: row for row, i in enumerate(ids)}
    matrix = np.zeros((len(ids), len(ids)))
    for (left, right), value in information.items():
        matrix[place[left], place[right]] = value
    left, values, _ = np.linalg.svd(matrix)
    np.testing.assert_allclose(
        found.vectors.double() @ found.vectors.double().T, left * values @ left.T, atol=1e-3 * values[0]
    )


def test_fewer_directions_keep_the_largest():
    tokenizer = new_tokenizer()
    everything = cooccurrence_vectors(TEXTS, tokenizer, dim=1000, min_count=2).vectors
    some = cooccurrence_vectors(TEXTS, tokenizer, dim=5, min_count=2).vectors
    assert some.shape == (len(everything), 5)
    torch.testing.assert_close(some.norm(dim=0), everything[:, :5].norm(dim=0), rtol=1e-2, atol=1e-2)


def test_same_seed_same_vectors_whatever_the_blocks(monkeypatch):
    tokenizer = new_tokenizer()
    one = cooccurrence_vectors(TEXTS, tokenizer, dim=8, min_count=2)
    two = cooccurrence_vectors(iter(TEXTS), tokenizer, dim=8, min_count=2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.vectors, cooccurrence_vectors(TEXTS, tokenizer, dim=8, min_count=2, seed=1).vectors)
    monkeypatch.setattr(tokalign, "TOGETHER", 3)
    blocks = cooccurrence_vectors(TEXTS, tokenizer, dim=8, min_count=2)
    torch.testing.assert_close(blocks.vectors, one.vectors, rtol=1e-3, atol=1e-3)
    assert torch.equal(blocks.counts, one.counts)


@pytest.fixture(scope="module")
def vocabulary():
    teacher = byte_level(TEXTS, 290, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return VocabularyPair(teacher, new_tokenizer(), 290)


def random_vectors(ids, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(rows, dtype=torch.int64)
    counts[ids] = torch.randint(1, 100, (len(ids),), generator=generator)
    return TokenVectors(torch.tensor(ids), torch.randn(len(ids), 6, generator=generator), counts)


@pytest.mark.parametrize("anchors", [3, 300])
def test_the_nearest_by_cosines_with_shared_tokens(vocabulary, anchors):
    source = random_vectors([i for i in range(290) if i % 7], 290, 0)
    target = random_vectors([i for i in range(330) if i % 5], 330, 1)
    found = tokalign_mixtures(vocabulary, source, target, anchors=anchors)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    theirs, ours = unit(source.vectors.double().numpy()), unit(target.vectors.double().numpy())
    at = [{int(i): row for row, i in enumerate(side.ids)} for side in (source, target)]
    shared = [(m.teacher_id, i) for i, m in vocabulary.matches.items() if m.teacher_id in at[0] and i in at[1]]
    shared = sorted(shared, key=lambda pair: (-int(target.counts[pair[1]]), pair[1]))[:anchors]
    theirs = unit(theirs @ theirs[[at[0][s] for s, _ in shared]].T)
    ours = unit(ours @ ours[[at[1][t] for _, t in shared]].T)
    special = {i for i, token in vocabulary.teacher_tokens.items() if token.kind == "special"}
    expected = {}
    for token_id, row in at[1].items():
        text = vocabulary.tokens[token_id].bytes.decode(errors="replace")
        if token_id not in vocabulary.matches and "\ufffd" not in text and any(c.isalpha() for c in text):
            best = int(source.ids[(theirs @ ours[row]).argmax()])
            if best not in special and vocabulary.tokens[token_id].kind == "text":
                expected[token_id] = best
    table = torch.arange(290.0)[:, None]
    assert dict(zip(found.ids.tolist(), found.rows(table)[:, 0].tolist(), strict=True)) == expected
    blocks = tokalign_mixtures(vocabulary, source, target, anchors=anchors, block_bytes=1)
    assert torch.equal(blocks.rows(table), found.rows(table))
    assert torch.equal(found.counts, target.counts)


def test_the_same_vocabulary_finds_itself(vocabulary):
    """Shared tokens that are taken for new ones: the nearest is the token itself."""
    student = byte_level(TEXTS, 290, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    pair = VocabularyPair(vocabulary.teacher, student, 290)
    hidden = [i for i in pair.matches if i % 2 and i > 260]
    pair.matches = {i: match for i, match in pair.matches.items() if i not in hidden}
    source, target = (cooccurrence_vectors(TEXTS, side, dim=20, min_count=1) for side in (pair.teacher, pair.student))
    found = tokalign_mixtures(pair, source, target)
    assert len(found.ids) >= 3
    right = found.coefficients.col_indices == found.ids
    assert right.float().mean() > 0.9


def test_bad_arguments_are_named(vocabulary):
    tokenizer = new_tokenizer()
    for name in ("dim", "window", "min_count"):
        with pytest.raises(ValueError, match=f"{name}: wanted at least 1, got 0"):
            cooccurrence_vectors(TEXTS, tokenizer, **{name: 0})
    for texts in ([], ["a"], [""]):
        with pytest.raises(ValueError, match="texts: wanted tokens with 10 occurrences"):
            cooccurrence_vectors(texts, tokenizer)
    with pytest.raises(TypeError, match="tokenizer: wanted a fast tokenizer"):
        cooccurrence_vectors(TEXTS, object())
    new = [i for i in vocabulary.tokens if i not in vocabulary.matches]
    with pytest.raises(ValueError, match=r"texts: wanted one of the \d+ shared tokens to have vectors on both sides"):
        tokalign_mixtures(vocabulary, random_vectors(list(range(290)), 290, 0), random_vectors(new, 330, 1))
