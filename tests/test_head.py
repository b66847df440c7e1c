"""The chunked cross-entropy against torch's own on whole logits, and what models do to their logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from matt_fast.model import head as head_module
from matt_fast.model.embeddings import EmbeddingTable, OutputRows
from matt_fast.model.head import Head, logit_rule

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def table(vocabulary: int, width: int) -> EmbeddingTable:
    """Every third row is frozen."""
    frozen_from = torch.arange(vocabulary)
    frozen_from[torch.arange(vocabulary) % 3 > 0] = -1
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary, width, generator=generator)
    return EmbeddingTable(weight, frozen_from, weight.clone())


def some_rows(of_table: EmbeddingTable, ids: torch.Tensor) -> OutputRows:
    """Those of `ids`, ascending, that are trained: a head takes any choice of rows."""
    ids = ids[of_table.slot[ids] >= 0]
    return OutputRows(ids, of_table.trainable[of_table.slot[ids]].requires_grad_())


def test_the_loss_through_liger_kernel_is_the_same_and_copies_no_table():
    """Its kernels in Triton's interpreter, in a process of their own: other tests import Triton first."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, Path(__file__).with_name("fused_head.py")], check=True, env=environment)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("at_once", [1, 37 * 5, 1 << 24])
@pytest.mark.parametrize(
    "rule",
    [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5, "bias": True}],
    ids=["plain", "scale", "softcap", "all"],
)
def test_loss_and_gradients_equal_those_of_whole_logits(tokens, at_once, rule, monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(tokens)
    rows_of = table(37, 5)
    rows_of.trainable = rows_of.trainable.double()
    rows = some_rows(rows_of, torch.tensor([1, 2, 3, 8, 20, 36]))
    bias = torch.randn(37, generator=generator).double() if rule.get("bias") else None
    options = {name: value for name, value in rule.items() if name != "bias"}
    weight = rows_of.weight().double()
    hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(37, (tokens,), generator=generator)
    ours = Head(weight, bias, **options).loss(hidden, targets, rows)
    (ours * 1.7).backward()

    reference = weight.clone().requires_grad_()
    theirs_hidden = hidden.detach().clone().requires_grad_()
    logits = theirs_hidden @ reference.T + (0 if bias is None else bias)
    logits = logits * options.get("scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    theirs = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / (tokens or 1)
    (theirs * 1.7).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(hidden.grad, theirs_hidden.grad)
    torch.testing.assert_close(rows.trainable.grad, reference.grad[rows.ids])


def test_bfloat16_is_as_exact_as_torch_with_its_logits():
    generator = torch.Generator().manual_seed(0)
    rows_of = table(301, 64)
    weight = rows_of.weight().bfloat16()
    rows = some_rows(rows_of, torch.arange(0, 301, 7))
    hidden = torch.randn(50, 64, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(301, (50,), generator=generator)
    Head(weight).loss(hidden, targets, rows).backward()
    exact, plain = hidden.detach().double().requires_grad_(), hidden.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ weight.double().T, targets).backward()
    torch.nn.functional.cross_entropy((plain @ weight.T).float(), targets).backward()
    ours = (hidden.grad.double() - exact.grad).norm()
    assert ours <= 2 * (plain.grad.double() - exact.grad).norm()


def test_where_many_rows_are_trained_their_gradient_is_passed_over_less_often(monkeypatch):
    """A chunk's logits are half as many as the gradient of the trained rows has numbers."""
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 1)
    sizes = []
    add = head_module.Gradients.add
    monkeypatch.setattr(
        head_module.Gradients, "add", lambda self, part, x: (sizes.append(len(x)), add(self, part, x))[-1]
    )
    rows_of = table(37, 64)
    weight = rows_of.weight()
    hidden = torch.randn(50, 64, requires_grad=True)
    targets = torch.randint(37, (50,))
    rows = some_rows(rows_of, torch.arange(37))  # 24
    Head(weight).loss(hidden, targets, rows).backward()
    assert sizes == [24 * 64 // 2 // 37] * 2 + [10]
    reference = weight.clone().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.detach() @ reference.T, targets).backward()
    torch.testing.assert_close(rows.trainable.grad, reference.grad[rows.ids])

    sizes.clear()  # a gradient of the rows that nobody wants asks for no larger chunks
    Head(weight).loss(hidden, targets, OutputRows(rows.ids, rows.trainable.detach())).backward()
    assert sizes == [1] * 50


def test_no_gradient_that_nobody_wants():
    rows_of = table(37, 5)
    rows = some_rows(rows_of, torch.tensor([1, 2]))
    hidden = torch.randn(3, 5)
    Head(rows_of.weight()).loss(hidden, torch.tensor([1, 2, 3]), rows).backward()
    assert hidden.grad is None
    assert rows.trainable.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (LlamaConfig(**SIZES), {"scale": 1.0, "softcap": None}),
        (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0), {"scale": 1.0, "softcap": 3.0}),
        (CohereConfig(**SIZES, logit_scale=0.25), {"scale": 0.25, "softcap": None}),
        (GraniteConfig(**SIZES, logits_scaling=8.0), {"scale": 0.125, "softcap": None}),
    ],
    ids=["llama", "gemma2", "cohere", "granite"],
)
def test_the_rule_of_known_architectures(config, rule):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    assert logit_rule(model) == rule


def test_logits_that_are_made_otherwise_are_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) ** 3 + 1
    with pytest.raises(ValueError, match="objective: LlamaForCausalLM does something to its logits"):
        logit_rule(model)
