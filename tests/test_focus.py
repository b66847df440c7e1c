"""FOCUS: sparsemax against its definition and against deepfocus, its memory, and fastText vectors of token ids."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import allocations
from tiny import TEXTS, byte_level, jsonl, new_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import fasttext
from matt_fast.initializers.fasttext import TokenVectors, fasttext_vectors
from matt_fast.initializers.focus import focus_mixtures, sparsemax, sparsemax_coefficients
from matt_fast.initializers.mixtures import Coefficients, apply
from matt_fast.support.texts import bounded_pieces

SMALL = {"dim": 8, "min_count": 2}


def plain_sparsemax(scores):
    """The definition (Martins and Astudillo 2016, algorithm 1), one row in float64."""
    falling = np.sort(scores.astype(np.float64))[::-1]
    size = np.arange(1, len(scores) + 1)
    support = size[1 + size * falling > np.cumsum(falling)].max()
    threshold = (falling[:support].sum() - 1) / support
    return np.maximum(scores.astype(np.float64) - threshold, 0)


def plain_cosines(targets, anchors):
    targets, anchors = (x.double().numpy() for x in (targets, anchors))
    lengths = np.linalg.norm(targets, axis=1)[:, None] * np.linalg.norm(anchors, axis=1)
    return targets @ anchors.T / lengths


def dense(coefficients: Coefficients, columns: int) -> torch.Tensor:
    offsets, col_indices, values = coefficients
    out = torch.zeros(len(offsets) - 1, columns)
    rows = torch.repeat_interleave(torch.arange(len(out)), offsets.diff())
    assert len(torch.unique(rows * columns + col_indices)) == len(values), "a place was written twice"
    out[rows, col_indices] = values
    return out


def weights_of(scores: torch.Tensor, **options) -> torch.Tensor:
    counts, columns, values = sparsemax(scores, **options)
    return dense(Coefficients(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), columns, values), scores.shape[1])


def space(tokens: int, dim: int = 30, seed: int = 0) -> torch.Tensor:
    """Vectors that share a direction, as those of fastText do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, dim, generator=generator) + torch.linspace(-1, 1, dim)


@st.composite
def score_tables(draw):
    """Multiples of 1/64, so that ties are common and sums are exact; rows up to several times FIRST_TOP."""
    width = draw(st.sampled_from([1, 2, 3, 17, 63, 64, 65, 256, 300]))
    spread = draw(st.sampled_from([1, 4, 64, 500]))
    seed = draw(st.integers(0, 10_000))
    return torch.randint(-spread, spread + 1, (3, width), generator=torch.Generator().manual_seed(seed)) / 64


@settings(max_examples=60, deadline=None)
@given(score_tables(), st.integers(-64, 64), st.integers(0, 100))
def test_sparsemax_invariants(scores, shift, seed):
    weights = weights_of(scores)
    np.testing.assert_allclose(weights, [plain_sparsemax(row) for row in scores.numpy()], atol=1e-6)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    torch.testing.assert_close(weights_of(scores + shift / 8), weights)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(weights_of(scores[:, order]), weights[:, order])
    assert torch.equal(weights_of(scores, room=1), weights)


@pytest.mark.parametrize(("m", "s"), [(1, 1), (3, 1), (7, 2), (63, 111), (5, 507), (0, 9)])
@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 28])
def test_coefficients_follow_the_definition(m, s, block_bytes):
    targets, anchors = space(m), space(s, seed=1)
    seen = []
    found = sparsemax_coefficients(targets, anchors, block_bytes=block_bytes, on_progress=lambda *at: seen.append(at))
    expected = [plain_sparsemax(row) for row in plain_cosines(targets, anchors)]
    np.testing.assert_allclose(dense(found, s), np.reshape(expected, (m, s)), atol=1e-6)
    assert [x.dtype for x in found] == [torch.int64, torch.int64, torch.float32]
    assert (found.values > 0).all()
    assert seen[-1] == (m, m)
    assert len(seen) == (max(m, 1) if block_bytes == 1 else len(seen))


def test_duplicate_anchors_share_their_weight():
    targets, anchors = space(9), space(40, seed=1)
    once = dense(sparsemax_coefficients(targets, anchors), 40)
    twice = dense(sparsemax_coefficients(targets, anchors.repeat(2, 1)), 80)
    assert torch.equal(twice[:, :40], twice[:, 40:])
    same = dense(sparsemax_coefficients(targets, anchors[:1].repeat(1000, 1)), 1000)  # a support of all anchors
    torch.testing.assert_close(same, torch.full((9, 1000), 1e-3))
    assert not torch.equal(once, twice[:, :40])  # two of a kind also push others out


def test_zero_vectors_and_extreme_lengths():
    targets, anchors = space(6), space(90, seed=1)
    expected = dense(sparsemax_coefficients(targets, anchors), 90)
    scaled = targets * torch.tensor([[1e-30], [1e30], [1], [2], [1e-38], [0]])
    spaced = torch.zeros(180, 30).index_copy(0, torch.arange(90) * 2 + 1, anchors * 1e25)
    found = dense(sparsemax_coefficients(scaled, spaced), 180)
    assert (found[:, ::2] == 0).all()
    assert (found[5] == 0).all()
    torch.testing.assert_close(found[:5, 1::2], expected[:5], atol=1e-5, rtol=0)
    nothing = sparsemax_coefficients(torch.zeros(2, 30), anchors)
    assert nothing.crow_indices.tolist() == [0, 0, 0]
    assert torch.equal(apply(nothing, anchors), torch.zeros(2, 30))


@pytest.mark.parametrize(
    ("targets", "anchors", "error", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, "one space"),
        (torch.ones(3), torch.ones(2, 3), ValueError, "targets: wanted .tokens, dimensions."),
        (torch.ones(2, 3), torch.ones(0, 3), ValueError, "anchors: wanted a vector other than zero"),
        (torch.ones(2, 3), torch.zeros(2, 3), ValueError, "anchors: wanted a vector other than zero"),
        (torch.ones(2, 3), torch.full((2, 3), torch.nan), ValueError, "anchors: wanted finite"),
        (torch.full((2, 3), torch.inf), torch.ones(2, 3), ValueError, "targets: wanted finite"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), TypeError, "anchors: wanted floating"),
    ],
)
def test_bad_vectors(targets, anchors, error, words):
    with pytest.raises(error, match=words):
        sparsemax_coefficients(targets, anchors)


def test_same_weights_as_deepfocus():
    """Its own function over one-hot rows gives the weights. 500 x 3,000 here; benchmarks/bench_focus.py: 5k x 20k."""
    deepfocus = pytest.importorskip("deepfocus.focus", exc_type=ImportError)
    targets, anchors = space(500, 50), space(3000, 50, seed=1)
    anchors[1::100] = anchors[::100]
    rows = torch.eye(3000)
    shared = {
        str(i): types.SimpleNamespace(auxiliary_embedding=anchors[i].numpy(), source_embedding=rows[i])
        for i in range(3000)
    }
    new = {
        str(i): types.SimpleNamespace(auxiliary_embedding=targets[i].numpy(), target=types.SimpleNamespace(id=i))
        for i in range(500)
    }
    expected = deepfocus.focus_additional_token_initialization(shared, new, torch.zeros(500, 3000), device="cpu")
    found = sparsemax_coefficients(targets, anchors)
    torch.testing.assert_close(dense(found, 3000), expected.float(), atol=1e-5, rtol=0)
    table = torch.randn(3000, 8)
    torch.testing.assert_close(apply(found, table), expected.float() @ table, atol=1e-4, rtol=0)


def test_memory_depends_on_the_block_and_not_on_the_targets():
    anchors, block = space(3000), 1 << 20
    extra = {}
    for m in (200, 800):
        targets = space(m, seed=1)
        found = sparsemax_coefficients(targets, anchors)
        result = 12 * len(found.values) + 8 * m
        for size in (block, 4 * block):
            peak, largest = allocations(lambda t=targets, b=size: sparsemax_coefficients(t, anchors, block_bytes=b))
            extra[m, size] = peak - 2 * result
            assert largest <= max(size / 2, 4 * anchors.numel(), result)
            assert extra[m, size] <= size + 4 * anchors.numel() + 16 * m + (64 << 10)
    assert extra[800, block] <= 1.1 * extra[200, block]
    assert extra[800, 4 * block] >= 2 * extra[800, block]  # so it is the block that is measured


def test_apply_in_blocks_of_columns():
    table = torch.randn(111, 37).bfloat16()
    found = sparsemax_coefficients(space(20), space(111, seed=1))
    expected = dense(found, 111) @ table.float()
    for block_bytes in (1, 5000, 1 << 28):
        rows = apply(found, table, block_bytes=block_bytes)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected)
    with pytest.raises(ValueError, match="weight: wanted a row for each column"):
        apply(found, table[:1])


def word_list(entries: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that takes everything between two bars for an entry, whatever it is."""
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=entries[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.usefixtures("_needs_fasttext")
def test_awkward_entries_stay_different_words():
    entries = ["?", " ", "  ", "\n", "\n\n", "\t", "\0", "\x0b", "\x0c", "\r", "a b", "a\nb", "ab", "日 本", "</s>"]
    entries += ["__label__x", "\ue000", "\ue000s", "\ue000\ue000", "\ue000:</s>", "<unused>"]
    tokenizer = word_list(entries)
    repeats = [3 + i for i in range(len(entries) - 1)]
    text = "|".join(entry for entry, n in zip(entries, repeats, strict=False) for _ in range(n))
    found = fasttext_vectors([text], tokenizer, dim=8, min_count=1, epochs=1)
    assert found.counts.tolist() == [*repeats, 0]
    assert found.ids.tolist() == list(range(len(entries) - 1))
    words = [fasttext._word(entry) for entry in entries]
    assert len(set(words)) == len(words)
    assert not any(set(word) & set(" \n\r\t\v\f\0") for word in words)
    assert fasttext._word("Ġreturn") == "Ġreturn"
    assert found.vectors.isfinite().all()
    assert len(torch.unique(found.vectors, dim=0)) == len(found.ids)


@pytest.fixture
def _needs_fasttext():
    pytest.importorskip("fasttext_pybind", exc_type=ImportError)


@pytest.mark.usefixtures("_needs_fasttext")
def test_vectors_are_deterministic_and_counted():
    tokenizer = new_tokenizer()
    one = fasttext_vectors(TEXTS, tokenizer, **SMALL)
    for size in (1 << 12, 1 << 18, 1 << 24):  # the allocator has remains to give
        _ = [torch.full((size,), 1e9) for _ in range(4)]
        two = fasttext_vectors(iter(TEXTS), tokenizer, **SMALL)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = fasttext_vectors(TEXTS, tokenizer, seed=1, **SMALL)
    assert torch.equal(one.ids, other.ids)
    assert not torch.equal(one.vectors, other.vectors)
    ids = [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert torch.equal(one.counts, torch.tensor(ids).bincount(minlength=len(tokenizer)))
    assert one.ids.tolist() == (one.counts >= 2).nonzero()[:, 0].tolist()
    assert 0 < len(one.ids) < len(tokenizer)
    assert (one.vectors.dtype, one.vectors.shape) == (torch.float32, (len(one.ids), 8))


@pytest.mark.usefixtures("_needs_fasttext")
def test_long_documents_are_cut_at_lines():
    text = "".join(TEXTS)
    pieces = list(bounded_pieces([text], 40))
    assert "".join(pieces) == text
    assert all(len(piece) <= 40 for piece in pieces)
    assert len(pieces) > 10


@pytest.mark.usefixtures("_needs_fasttext")
def test_same_vectors_as_deepfocus(tmp_path, monkeypatch):
    """Bit for bit: same words, same options, where it can be used at all (no seed, byte-level vocabulary)."""
    theirs = pytest.importorskip("deepfocus.fasttext_embs", exc_type=ImportError)
    monkeypatch.setattr(theirs, "CACHE_DIR", tmp_path / "cache")
    tokenizer = new_tokenizer()
    file = tmp_path / "text.jsonl"
    file.write_text(jsonl(TEXTS))
    model = theirs.train_fasttext(str(file), tokenizer, epochs=3, dim=8, min_count=2, processes=1)
    found = fasttext_vectors(TEXTS, tokenizer, epochs=3, dim=8, min_count=2)
    words = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    assert set(model.get_words()) == {"</s>", *words}
    assert np.array_equal(found.vectors.numpy(), np.stack([model.get_word_vector(word) for word in words]))


@pytest.mark.usefixtures("_needs_fasttext")
def test_bad_options():
    tokenizer = new_tokenizer()
    for name, least in (("dim", 8), ("epochs", 1), ("min_count", 1)):
        with pytest.raises(ValueError, match=f"{name}: wanted at least {least}, got {least - 1}"):
            fasttext_vectors(TEXTS, tokenizer, **{name: least - 1})
    with pytest.raises(ValueError, match="texts: wanted a token with 10 occurrences"):
        fasttext_vectors([], tokenizer)
    with pytest.raises(TypeError, match="tokenizer: wanted a fast tokenizer"):
        fasttext_vectors(TEXTS, object())


@pytest.fixture(scope="module")
def vocabulary():
    teacher = byte_level(TEXTS, 290, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return VocabularyPair(teacher, new_tokenizer(), 290)


def vectors_for(vocabulary, ids) -> TokenVectors:
    counts = torch.zeros(vocabulary.rows, dtype=torch.int64).index_fill(0, ids, 10)
    return TokenVectors(ids, space(len(ids)), counts)


@pytest.mark.usefixtures("_needs_fasttext")
def test_rows_from_text(vocabulary):
    vectors = fasttext_vectors(TEXTS, vocabulary.student, **SMALL)
    found = focus_mixtures(vocabulary, vectors, torch.device("cpu"))
    new = set(vocabulary.tokens) - set(vocabulary.matches)
    assert set(found.ids.tolist()) == new & set(vectors.ids.tolist())
    assert torch.equal(found.counts, vectors.counts)
    assert found.rows(torch.randn(290, 24)).shape == (len(found.ids), 24)
    assert len(found.ids) > 0


def test_rows_are_mixtures_of_shared_tokens(vocabulary):
    ids = torch.tensor([i for i in sorted(vocabulary.tokens) if i % 3])
    vectors = vectors_for(vocabulary, ids)
    vectors.vectors[-1] = 0  # as good as none
    vectors.counts[-1] = 1
    weight, head = torch.randn(290, 24), torch.randn(290, 7)
    found = focus_mixtures(vocabulary, vectors, torch.device("cpu"))
    new = {i for i in vocabulary.tokens if i not in vocabulary.matches}
    assert set(found.ids.tolist()) == new & set(ids[:-1].tolist())
    place = {int(token_id): row for row, token_id in enumerate(ids)}
    anchors = [i for i in sorted(vocabulary.matches) if i in place]
    used = [vocabulary.matches[i].teacher_id for i in anchors]
    cosines = plain_cosines(
        vectors.vectors[[place[i] for i in found.ids.tolist()]], vectors.vectors[[place[i] for i in anchors]]
    )
    weights = torch.from_numpy(np.stack([plain_sparsemax(row) for row in cosines])).float()
    torch.testing.assert_close(found.rows(weight), weights @ weight[used], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.rows(head), weights @ head[used], atol=1e-5, rtol=0)


def test_rows_refuse_what_does_not_fit(vocabulary):
    new = torch.tensor([i for i in vocabulary.tokens if i not in vocabulary.matches])
    with pytest.raises(ValueError, match=r"at least one of the \d+ shared tokens, got none"):
        focus_mixtures(vocabulary, vectors_for(vocabulary, new), torch.device("cpu"))
    everything = vectors_for(vocabulary, torch.tensor(sorted(vocabulary.tokens)))
    with pytest.raises(ValueError, match="weight: wanted a row for each column"):
        focus_mixtures(vocabulary, everything, torch.device("cpu")).rows(torch.randn(3, 4))
    with pytest.raises(ValueError, match="vectors: wanted ids below"):
        focus_mixtures(vocabulary, everything._replace(ids=everything.ids + 1), torch.device("cpu"))
