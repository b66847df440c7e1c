"""A notebook's settings do not reach the work, and the work leaves them as they were."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from safetensors.torch import load_file
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model

from matt_fast import HealingOptions, TrainingOptions, apply, compare_initializers, plan, transfer
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.evaluating import evaluate_models
from matt_fast.support.own_state import own_state


@pytest.fixture
def no_accelerate():
    states = [(x, dict(x._shared_state)) for x in (AcceleratorState, PartialState)]
    for state, _ in states:
        state._shared_state.clear()
    yield
    for state, kept in states:
        state._shared_state.clear()
        state._shared_state.update(kept)


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def settings():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device().type,
    )


def test_what_was_set_is_unset_inside_and_set_again_behind():
    usual = settings()
    with torch.device("cpu"), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        try:
            before = settings()
            with own_state():
                assert settings() == usual
            assert settings() == before
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)


def test_random_numbers_go_on_behind_it():
    expected = []
    for work in (False, True):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
        draws()
        if work:
            with own_state():
                random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
                draws()
        expected.append(draws())
    assert expected[0] == expected[1]


def test_accelerate_begins_anew_behind_it(no_accelerate):
    with own_state():
        Accelerator(cpu=True, mixed_precision="no")
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    with own_state():
        assert Accelerator().mixed_precision == "bf16"  # somebody else's is left alone
    assert is_initialized()


def test_a_notebook_that_only_infers_trains_the_same(tmp_path, no_accelerate, monkeypatch):
    """Without gradients training would go on all the same, on nonsense; another precision is another matter."""
    save_tiny_model(tmp_path / "model")
    new_tokenizer().save_pretrained(tmp_path / "new")
    (tmp_path / "texts.jsonl").write_text(jsonl(TEXTS))
    sources = [tmp_path / x for x in ("model", "new", "texts.jsonl")]

    def rows(name, precision="no"):
        options = {"training": TrainingOptions(steps=4, lr=1e-2), "max_length": 64, "precision": precision}
        transfer(*sources, tmp_path / name, **options, on_message=lambda message: None)
        return load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]

    expected, before = rows("plain"), settings()
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = rows("inference")
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(found, expected)
    assert settings() == before
    assert not torch.equal(rows("bf16", "bf16"), expected)

    def planned():
        found = plan(*sources[:2], length=16, batch_size=1, healing=HealingOptions("lora"))
        return found.step, found.healing

    def figures():
        return evaluate_models({"one": sources[0]}, {"text": sources[2]}, pieces=1).texts

    usual = planned(), figures()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        compare_initializers(*sources[:2], sources[2], ["mean"], eval_pieces=1)
        assert (planned(), figures()) == usual  # a step without gradients would take less memory
    assert not is_initialized()

    seen, load = [], Teacher.load
    monkeypatch.setattr(Teacher, "load", lambda *x, **y: seen.append(torch.is_grad_enabled()) or load(*x, **y))
    apply(tmp_path / "plain", sources[0], tmp_path / "applied")
    assert seen[0] is False  # it keeps nothing for a backward pass that never comes
    assert not is_initialized()
