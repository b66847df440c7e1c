"""AIM on attention weights: the reference library's calls, against sums written out and against `aim_loss`."""

import re

import pytest
import torch

from matt_fast import aim_impl, aim_loss, aim_star_impl
from matt_fast.training.aim_impl import get_aim_impl, get_aim_star_states, get_aim_states

STATES = {"aim": get_aim_states, "aim_star": get_aim_star_states}
# Rows of the two sides have the same words; padding, special tokens and words of several tokens are among them.
WORD_IDS = {
    "teacher": torch.tensor([[-100, 0, 0, 1, 2, 2, 2, -100], [0, 1, 1, -100, 2, 3, -100, -100]]),
    "student": torch.tensor([[-100, 0, 1, 1, 2, -100], [0, 1, 2, 2, 3, -100]]),
}


def attention(word_ids, heads=2, value_heads=2, dim=3):
    """Causal attention weights [B, H, n, n] and values [B, H_kv, n, d], drawn at random."""
    rows, length = word_ids.shape
    logits = torch.randn(rows, heads, length, length, dtype=torch.float64)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    return weights, torch.randn(rows, value_heads, length, dim, dtype=torch.float64)


def words_of(ids: list[int]) -> list[list[int]]:
    """The positions of each run of one id."""
    words = []
    for position, word in enumerate(ids):
        if word != -100 and position and ids[position - 1] == word:
            words[-1].append(position)
        elif word != -100:
            words.append([position])
    return words


def written_out(variant, word_ids, weights, values):
    """The states as sums over single tokens."""
    zero, found = torch.zeros(values.shape[-1], dtype=values.dtype), []
    group = weights.shape[1] // values.shape[1]
    for row, ids in enumerate(word_ids.tolist()):
        words = words_of(ids)
        for head in range(weights.shape[1]):
            for i, word in enumerate(words):
                taken = words[: i + 1] if variant == "aim" else [range(len(ids))]
                for tokens in taken:
                    parts = [weights[row, head, word[-1], t] * values[row, head // group, t] for t in tokens]
                    found.append(sum(parts, zero))
    return torch.stack(found)


@pytest.mark.parametrize("value_heads", [2, 1])
@pytest.mark.parametrize("side", list(WORD_IDS))
@pytest.mark.parametrize("variant", list(STATES))
def test_states_of_a_side(variant, side, value_heads):
    torch.manual_seed(0)
    ids = WORD_IDS[side]
    weights, values = attention(ids, value_heads=value_heads)
    found = STATES[variant](word_ids=ids, attn_weights=weights, value_states=values)
    torch.testing.assert_close(found, written_out(variant, ids, weights, values))


@pytest.mark.parametrize("variant", list(STATES))
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 2)], ids=["rows", "heads", "both"])
def test_one_word_in_several_rows_and_heads(variant, shape):
    """A word of one token takes its own value whole: each row and head has a state of its own, in their order."""
    values = torch.arange(1.0, 1 + shape[0] * shape[1]).view(*shape, 1, 1)
    found = STATES[variant](torch.zeros(shape[0], 1, dtype=torch.int64), torch.ones(*shape, 1, 1), values)
    torch.testing.assert_close(found, values.view(-1, 1))


@pytest.mark.parametrize("variant", list(STATES))
@pytest.mark.parametrize(
    "ids",
    [
        [[3, 3, -100, 3, 7, 0, 0]],  # an id that comes again is another word
        [[0, 1, 1], [1, 2, 2]],  # the last id of a row is the first of the next
        [[5, 5, 5], [-100, -100, 5]],  # first and last id are the same
        [[-1, -2, -2]],  # -100 alone is no word
    ],
)
def test_words_are_runs_within_a_row(variant, ids):
    torch.manual_seed(0)
    ids = torch.tensor(ids)
    weights, values = attention(ids)
    found = STATES[variant](ids, weights, values)
    torch.testing.assert_close(found, written_out(variant, ids, weights, values))


@pytest.mark.parametrize("variant", list(STATES))
@pytest.mark.parametrize(("rows", "length"), [(2, 3), (2, 0), (0, 3)])
def test_no_word_no_state(variant, rows, length):
    ids = torch.full((rows, length), -100)
    weights, values = torch.ones(rows, 2, length, length), torch.ones(rows, 2, length, 5, dtype=torch.bfloat16)
    found = STATES[variant](ids, weights, values)
    assert (found.shape, found.dtype) == ((0, 5), torch.float32)


@pytest.mark.parametrize("variant", list(STATES))
def test_states_have_gradients(variant):
    torch.manual_seed(0)
    ids = WORD_IDS["teacher"]
    given = [x.requires_grad_() for x in attention(ids)]
    found, wanted = STATES[variant](ids, *given), written_out(variant, ids, *given)
    factor = torch.randn_like(found)
    for mine, theirs in zip(*(torch.autograd.grad(x, given, factor) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", list(STATES))
def test_an_implementation_by_its_name(name):
    torch.manual_seed(0)
    implementation = get_aim_impl(name)
    assert implementation is {"aim": aim_impl, "aim_star": aim_star_impl}[name]
    given = {}
    for side, ids in WORD_IDS.items():
        given[f"{side}_word_ids"] = ids
        given[f"{side}_attn_weights"], given[f"{side}_value_states"] = attention(ids)
    for side, found in zip(WORD_IDS, implementation(**given), strict=True):
        kinds = ("word_ids", "attn_weights", "value_states")
        assert torch.equal(found, STATES[name](*(given[f"{side}_{kind}"] for kind in kinds)))


def test_another_name():
    with pytest.raises(ValueError, match="name: wanted one of aim, aim_star, got 'AIM'"):
        get_aim_impl("AIM")


@pytest.mark.parametrize("variant", list(STATES))
@pytest.mark.parametrize(
    ("ids", "weights", "values"),
    [
        ((4,), (1, 2, 4, 4), (1, 2, 4, 3)),
        ((1, 4), (1, 2, 4, 3), (1, 2, 4, 3)),
        ((1, 4), (1, 2, 4, 4), (1, 2, 3, 3)),
        ((1, 4), (1, 3, 4, 4), (1, 2, 4, 3)),
        ((1, 4), (1, 2, 4, 4), (1, 0, 4, 3)),
        ((2, 4), (1, 2, 4, 4), (1, 2, 4, 3)),
    ],
)
def test_shapes_that_do_not_fit(variant, ids, weights, values):
    message = f"wanted attn_weights [B, H, n, n], value_states [B, H or H_kv, n, d], word_ids [B, n]; got {weights}"
    with pytest.raises(ValueError, match=re.escape(message)):
        STATES[variant](torch.zeros(ids, dtype=torch.int64), torch.ones(weights), torch.ones(values))


@pytest.mark.parametrize("value_heads", [4, 2])
@pytest.mark.parametrize("variant", list(STATES))
def test_the_loss_is_their_mean_squared_difference(variant, value_heads):
    torch.manual_seed(0)
    sides, states = [], []
    for ids in WORD_IDS.values():
        query, key = (torch.randn(2, 4, ids.shape[1], 8, dtype=torch.float64) for _ in range(2))
        future = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        weights = (query @ key.transpose(2, 3) * 8**-0.5 + future).softmax(-1)
        value = torch.randn(2, value_heads, ids.shape[1], 8, dtype=torch.float64)
        sides.append((query, key, value.repeat_interleave(4 // value_heads, 1)))
        states += [weights, value, ids]
    teacher, student = get_aim_impl(variant)(*states)
    loss = aim_loss(*sides, *WORD_IDS.values(), variant=variant, backend="eager")
    torch.testing.assert_close(loss, (teacher - student).square().mean())


def test_aim_impl_refuses_words_that_differ():
    weights, values = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 2)
    given = weights, values, torch.tensor([[0, 1, 1]]), weights, values
    apart = torch.tensor([[0, 1, 0]])
    with pytest.raises(ValueError, match=r"word_ids: wanted ids that ascend in row 0, got \[0, 1, 0\]"):
        aim_impl(weights, values, apart, weights, values, apart)
    with pytest.raises(ValueError, match=re.escape("wanted the teacher's words in row 0, [0, 1]; got [0, 1, 2]")):
        aim_impl(*given, torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="student_word_ids: wanted the teacher's 1 rows, got 2"):
        aim_impl(*given[:3], *(x.repeat(2, *[1] * (x.ndim - 1)) for x in given[:3]))
    with pytest.raises(ValueError, match="student: wanted attn_weights"):
        aim_star_impl(*given, torch.tensor([[0, 1]]))
