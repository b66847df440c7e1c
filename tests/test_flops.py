"""Work of a training step, against products counted by hand."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tiny import TEXTS, new_tokenizer, save_tiny_model
from torch import nn

from matt_fast import TrainingOptions, transfer
from matt_fast.support.flops import FLOPS, FlopCounter, count_flops


@dataclass
class Progress:
    step: int = 0
    flops: int = 0
    counted_flops: int = 0
    counted_tokens: int = 0


def test_products_forward_and_backward():
    frozen = nn.Linear(5, 3).requires_grad_(False)
    trained = nn.Linear(3, 4, bias=False)
    given = torch.randn(7, 5)
    with FlopCounter() as counter:
        trained(frozen(given)).sum().backward()
    assert counter.flops == 2 * (7 * 5 * 3 + 7 * 3 * 4 + 7 * 3 * 4)  # the trained weight's gradient, and no other
    with FlopCounter() as counter:
        torch.randn(2, 3, 5).baddbmm_(torch.randn(2, 3, 7), torch.randn(2, 7, 5))
        torch.baddbmm(torch.randn(2, 3, 5), torch.randn(2, 3, 7), torch.randn(2, 7, 5))
        torch.einsum("bij,jk->bik", torch.randn(2, 3, 7), torch.randn(7, 5))
    assert counter.flops == 3 * 2 * (2 * 3 * 7 * 5)


def test_attention_with_grouped_heads():
    query = torch.randn(2, 4, 9, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 9, 8).unbind()
    with FlopCounter() as counter:
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    product = 2 * 2 * 4 * 9 * 9 * 8
    assert counter.flops == 2 * product
    with FlopCounter() as counter:
        attended.sum().backward()
    assert counter.flops == 5 * product  # with the scores once more


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_products_are_those_of_the_weights(bits):
    import bitsandbytes as bnb

    kind, options = {
        8: (bnb.nn.Linear8bitLt, {"has_fp16_weights": False}),
        4: (bnb.nn.Linear4bit, {"compute_dtype": torch.float32}),
    }[bits]
    layer = kind(64, 32, bias=False, **options)
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer.to("cpu").requires_grad_(False)
    given = torch.randn(5, 64, requires_grad=True)
    with FlopCounter() as counter:
        layer(given).sum().backward()
    assert counter.flops == 2 * 2 * 5 * 64 * 32


def test_every_power_of_two_is_counted_and_others_follow_from_their_tokens():
    work = Progress()
    sizes = [3, 5, 4, 1, 7, 2, 2, 9, 6, 8]  # rows of a product, which is all of a step
    seen = []
    for step, rows in enumerate(sizes):
        with count_flops(work, tokens=rows + 1):  # a token without work
            seen.append(torch._C._len_torch_dispatch_stack() > 0)
            torch.randn(rows, 10) @ torch.randn(10, 10)
        work.step = step + 1
    assert [step for step, counted in enumerate(seen, 1) if counted] == [1, 2, 4, 8]
    counted, tokens, expected = 0, 0, 0
    for step, rows in enumerate(sizes, 1):
        if step in (1, 2, 4, 8):
            counted, tokens = counted + 200 * rows, tokens + rows + 1
            expected += 200 * rows
        else:
            expected += round((rows + 1) * counted / tokens)
    assert work.flops == expected
    assert (work.counted_flops, work.counted_tokens) == (counted, tokens)


def test_a_step_that_fails_is_not_counted():
    work = Progress()
    with pytest.raises(RuntimeError, match="size of tensor"), count_flops(work, 3):
        (torch.randn(2, 2) @ torch.randn(2, 2)).add_(torch.ones(3))
    assert work == Progress()
    assert torch._C._len_torch_dispatch_stack() == 0


def test_what_is_compiled_is_compiled_after_the_first_step_too():
    ran = []

    def backend(graph, inputs):
        return lambda *given: ran.append("compiled") or graph(*given)

    product = torch.compile(lambda x: x @ x, backend=backend)
    work = Progress()
    for step in range(6):
        with count_flops(work, 1):
            product(torch.ones(3, 3))
        work.step = step + 1
    assert len(ran) == 3  # steps 3, 5 and 6
    assert work.flops == 6 * 2 * 3**3


def test_counting_changes_no_bit(tmp_path):
    save_tiny_model(tmp_path / "teacher")
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS))
    for objective in ("aim", "token-distillation+boundary-head", "ntp"):
        arguments = [tmp_path / name for name in ("teacher", "tokenizer", "data.txt")]
        options = {"training": TrainingOptions(objective=objective, steps=2), "max_length": 48}
        transfer(*arguments, tmp_path / f"{objective} not counted", **options)
        with FlopCounter() as counter:
            transfer(*arguments, tmp_path / f"{objective} counted", **options)
        assert counter.flops > 0
        counted, not_counted = (
            (tmp_path / f"{objective} {kind}" / "model.safetensors").read_bytes() for kind in ("counted", "not counted")
        )
        assert counted == not_counted


@pytest.mark.parametrize(
    "name", ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"]
)
def test_attention_with_fewer_key_heads_is_counted_on_every_device(name):
    """Shapes alone are looked at. torch's own counts refuse them, and what CUDA calls no test here would run."""
    query, key = torch.empty(2, 6, 11, 16, device="meta"), torch.empty(2, 2, 13, 16, device="meta")
    one_product = 2 * 2 * 6 * 11 * 13 * 16
    forward, backward = (getattr(torch.ops.aten, f"_scaled_dot_product_{name}{x}") for x in ("", "_backward"))
    assert FLOPS[forward](query, key, key) == 2 * one_product
    assert FLOPS[backward](query, query, key, key) == 5 * one_product
