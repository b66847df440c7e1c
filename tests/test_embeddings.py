"""Compact rows against torch's own embedding, autograd and AdamW on the whole table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from matt_fast.model.embeddings import EmbeddingTable, RowAdamW, embed

HIDDEN = 5


def make_table(frozen_from, teacher_rows=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(teacher_rows, HIDDEN, generator=generator).to(dtype)
    initial = torch.randn(len(frozen_from), HIDDEN, generator=generator)
    return EmbeddingTable(teacher, torch.tensor(frozen_from), initial), teacher, initial


@settings(deadline=None)
@given(
    st.lists(st.integers(-1, 6), min_size=1, max_size=12).flatmap(
        lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=30))
    )
)
def test_rows_and_gradients_equal_a_dense_embedding(case):
    frozen_from, ids = case
    table, teacher, initial = make_table(frozen_from)
    ids = torch.tensor(ids)[None]
    dense = torch.stack([teacher[t] if t >= 0 else initial[s] for s, t in enumerate(frozen_from)]).requires_grad_()
    upstream = torch.randn(*ids.shape, HIDDEN, generator=torch.Generator().manual_seed(2))
    expected = nn.functional.embedding(ids, dense)
    expected.backward(upstream)

    rows = table.rows(ids)
    result = embed(nn.Embedding(1, HIDDEN), rows, ids)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    if len(rows.slots):
        result.backward(upstream)
        trained = table.trainable_ids[rows.slots]
        torch.testing.assert_close(rows.trainable.grad, dense.grad[trained])
    assert set(table.trainable_ids[rows.slots].tolist()) == {i for i in ids.flatten().tolist() if frozen_from[i] < 0}
    torch.testing.assert_close(table.weight(), dense.detach(), rtol=0, atol=0)


def test_rows_in_every_step_follow_adamw():
    table, _, _ = make_table([-1, -1, -1])
    reference = table.trainable.clone().requires_grad_()
    adamw = torch.optim.AdamW([reference], lr=0.03, weight_decay=0.0)
    ours = RowAdamW(table.trainable, lr=0.03)
    for step in range(20):
        reference.grad = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(step))
        ours.step(torch.arange(3), reference.grad)
        adamw.step()
    torch.testing.assert_close(table.trainable, reference.detach())


@pytest.mark.parametrize("moments", ["lazy", "dense"])
@pytest.mark.parametrize("occurring", ["all", "some"])
def test_moments_against_adamw_with_zero_gradients(moments, occurring):
    """Dense moments are AdamW's everywhere; lazy ones where a row occurs in every step, or never did."""
    table, _, initial = make_table([-1] * 6)
    reference = table.trainable.clone().requires_grad_()
    adamw = torch.optim.AdamW([reference], lr=0.03, weight_decay=0.0)
    ours = RowAdamW(table.trainable, lr=0.03, moments=moments)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        slots = torch.arange(6) if occurring == "all" else torch.tensor([4, 0, 1 + step % 2])
        gradient = torch.randn(len(slots), HIDDEN, generator=generator)
        reference.grad = torch.zeros_like(reference).index_copy(0, slots, gradient)
        ours.lr = adamw.param_groups[0]["lr"] = 0.03 / (1 + step)
        ours.step(slots, gradient)
        adamw.step()
    equal = [torch.allclose(*rows, rtol=1e-5, atol=1e-6) for rows in zip(table.trainable, reference, strict=True)]
    assert equal == ([True] * 6 if "all" in occurring or moments == "dense" else [True, False, False] + [True] * 3)
    if occurring == "some":
        assert torch.equal(table.trainable[[3, 5]], initial[[3, 5]])


def test_a_row_that_does_not_occur_is_untouched_and_later_corrected_by_its_own_count():
    table, _, _ = make_table([-1, -1])
    before = table.trainable.clone()
    ours = RowAdamW(table.trainable, lr=0.01)
    for _ in range(50):
        ours.step(torch.tensor([0]), torch.ones(1, HIDDEN))
    torch.testing.assert_close(table.trainable[1], before[1], rtol=0, atol=0)
    ours.step(torch.tensor([1]), torch.full((1, HIDDEN), 1e-3))
    torch.testing.assert_close(table.trainable[1], before[1] - 0.01, rtol=0, atol=1e-5)  # Adam's first step is lr


def test_frozen_rows_are_read_from_the_teacher_and_keep_its_dtype():
    table, teacher, _ = make_table([3, -1, 0], dtype=torch.bfloat16)
    assert table.teacher_weight.data_ptr() == teacher.data_ptr()
    assert table.trainable.dtype == torch.float32
    assert table.rows(torch.tensor([0, 1])).weight().dtype == torch.bfloat16
    assert table.weight().dtype == torch.bfloat16


def test_the_models_own_embedding_scales():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    table, teacher, initial = make_table([2, -1])
    scaled = Gemma3TextScaledWordEmbedding(7, HIDDEN, padding_idx=None, embed_scale=HIDDEN**0.5)
    ids = torch.tensor([1, 0])
    expected = torch.stack([initial[1], teacher[2]]) * scaled.embed_scale
    torch.testing.assert_close(embed(scaled, table.rows(ids), ids), expected)


def test_bad_shapes_are_named():
    teacher = torch.zeros(4, HIDDEN)
    with pytest.raises(ValueError, match=r"initial: wanted shape \(2, 5\).*got \(3, 5\)"):
        EmbeddingTable(teacher, torch.tensor([0, -1]), torch.zeros(3, HIDDEN))
    with pytest.raises(ValueError, match="frozen_from: wanted teacher rows below 4, got 4"):
        EmbeddingTable(teacher, torch.tensor([4, -1]), torch.zeros(2, HIDDEN))


def test_output_rows_are_all_rows_and_share_their_leaf_with_the_rows_of_a_batch():
    table, _, initial = make_table([-1, 2, -1, -1])
    output = table.output_rows()
    assert output.ids.tolist() == [0, 2, 3]
    ids = torch.tensor([2, 1, 2])
    (embed(nn.Embedding(1, HIDDEN), table.rows(ids, output), ids).sum() + (output.trainable[2] * 3).sum()).backward()
    wanted = torch.tensor([0.0, 2.0, 3.0])[:, None].expand(3, HIDDEN)  # token 2 was read twice, token 3 predicts
    torch.testing.assert_close(output.trainable.grad, wanted)
    table.trainable += 1
    torch.testing.assert_close(output.trainable.detach(), initial[[0, 2, 3]] + 1)
