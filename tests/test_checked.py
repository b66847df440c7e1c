"""Arguments from Python, numbers of NumPy and objects in place of paths: named where they do not fit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from matt_fast import TrainingOptions, compare_initializers, evaluate, plan, sweep_layers, tokenizers, transfer
from matt_fast.recipe.evaluating import evaluate_models
from matt_fast.recipe.preparing import prepare
from matt_fast.support.checks import check_type, checked


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (3, int | None),
        (None, int | None),
        (2, float),
        ("a", str | Path),
        (["a", "b"], Sequence[str]),
        ((), Sequence[str]),
        ((x for x in "ab"), Iterable[str]),
        ({"a": Path("b")}, str | Mapping[str, str | Path]),
        (len, str | Callable[[str], int]),
        ({"time": 3}, Mapping[str, Any] | None),
        ("auto", bool | Literal["auto"]),
        (True, bool | Literal["auto"]),
    ],
)
def test_what_fits_is_given_back(value, wanted):
    assert check_type("name", value, wanted) is value


@pytest.mark.parametrize(
    ("value", "wanted", "message"),
    [
        ("3", int, r"name: wanted int, got '3' \(str\)"),
        (True, int, r"wanted int, got True \(bool\)"),
        (1, bool, r"wanted bool, got 1 \(int\)"),
        (0.5, int | None, r"wanted int or None, got 0\.5 \(float\)"),
        ("uk", Sequence[str], r"wanted Sequence\[str\], got 'uk' \(str\)"),
        (["uk", 1], Sequence[str], r"wanted Sequence\[str\], got \['uk', 1\] \(list\)"),
        ({"a": 1}, Mapping[str, str | Path], r"wanted Mapping\[str, str \| Path\], got \{'a': 1\} \(dict\)"),
        ("f", Callable[[str], int] | None, r"wanted a function or None, got 'f' \(str\)"),
        (3, bool | Literal["auto"], r"wanted bool or 'auto', got 3 \(int\)"),
        (torch.nn.Linear(2, 2), str | Path, r"wanted str or Path, got Linear\(in_features=2, .* \(Linear\)"),
        ("x" * 999, int, r"wanted int, got 'x{79}… \(str\)"),
    ],
)
def test_what_does_not_fit_is_named(value, wanted, message):
    with pytest.raises(TypeError, match=message):
        check_type("name", value, wanted)


def test_numbers_of_numpy_become_pythons():
    for value, wanted, kind in (
        (np.int64(3), int, int),
        (np.float32(0.5), float, float),
        (np.float64(2), float, float),
    ):
        assert type(check_type("name", value, wanted)) is kind
    assert type(TrainingOptions(steps=np.int64(3)).steps) is int

    @checked
    def add(a: int, *, b: float = 1, **others):
        """Documented."""
        return a, b, others

    assert [type(x) for x in add(np.int64(2), b=np.float32(1), c=np.int64(1))[:2]] == [int, float]
    assert add.__doc__ == "Documented."
    with pytest.raises(TypeError, match=r"b: wanted float, got '1' \(str\)"):
        add(2, b="1")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    save_tiny_model(folder / "model")
    new_tokenizer().save_pretrained(folder / "new")
    (folder / "texts.jsonl").write_text(jsonl(TEXTS))
    return [folder / x for x in ("model", "new", "texts.jsonl")]


def test_whole_jobs_name_what_does_not_fit(places, tmp_path):
    model, tokenizer, data = places
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for call, message in (
        (lambda: transfer(loaded, tokenizer, data, tmp_path / "o"), r"model: wanted str or Path, got LlamaForCausalLM"),
        (lambda: transfer(model, tokenizer, TEXTS, tmp_path / "o"), r"data: wanted str or Path or None, got \['def"),
        (lambda: transfer(*places, tmp_path / "o", training={"steps": 1}), r"training: wanted TrainingOptions or None"),
        (lambda: transfer(*places, tmp_path / "o", device=torch.device("cpu")), r"device: wanted str or None"),
        (lambda: transfer(*places, tmp_path / "o", language="uk"), r"language: wanted Sequence\[str\], got 'uk'"),
        (lambda: plan(model, tokenizer, batch_size="2"), r"batch_size: wanted int, got '2'"),
        (lambda: compare_initializers(*places, "mean"), r"inits: wanted Iterable\[.*\], got 'mean'"),
        (lambda: sweep_layers(*places, tmp_path / "o", data, max_length="8"), r"max_length: wanted int, got '8'"),
        (lambda: tokenizers.extend(model, tmp_path / "o", data=TEXTS), r"data: wanted str or Path or None, got \['def"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert not (tmp_path / "o").exists()


def test_numpys_numbers_make_the_same_run(places, tmp_path):
    results = []
    for name, number in (("a", int), ("b", np.int64)):
        options = {"max_length": number(64), "batch_size": number(2), "seed": number(1)}
        training = TrainingOptions(steps=number(2))
        transfer(*places, tmp_path / name, **options, training=training, on_message=lambda message: None)
        results.append((tmp_path / name / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_evaluate_wants_texts_and_what_is_loaded(places):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(places[0]), AutoTokenizer.from_pretrained(places[0])
    for given, message in (
        ((model, tokenizer, str(places[2])), r"documents: wanted texts, .* got '/.*texts\.jsonl' \(str\)"),
        ((model, tokenizer, places[2]), r"documents: wanted texts"),
        (
            (model, tokenizer, [{"text": "a"}]),
            r"documents: wanted each to be a str or None, got \{'text': 'a'\} \(dict\)",
        ),
        ((places[0], tokenizer, TEXTS), r"model: wanted a language model, loaded, got PosixPath"),
        ((model, places[0], TEXTS), r"tokenizer: wanted PreTrainedTokenizerBase, got PosixPath"),
    ):
        with pytest.raises(TypeError, match=message):
            evaluate(*given)


def test_evaluate_without_dropout(places):
    tokenizer = AutoTokenizer.from_pretrained(places[0])
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=4096)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = evaluate(model, tokenizer, TEXTS[:2])
    model.train()
    model.transformer.h[0].eval()
    modes = [x.training for x in model.modules()]
    assert evaluate(model, tokenizer, TEXTS[:2]) == expected
    assert [x.training for x in model.modules()] == modes


def test_measuring_and_preparing_name_theirs_too(places):
    model, tokenizer, texts = places[:3]
    for name in ("pieces", "tasks", "prompts", "speed", "device"):
        with pytest.raises(TypeError, match=f"{name}: wanted "):
            evaluate_models({"a": str(model)}, {"text": texts}, **{name: object()})
    for name in ("max_length", "shards", "workers", "executor_options"):
        with pytest.raises(TypeError, match=f"{name}: wanted "):
            prepare(model, tokenizer, texts, model.parent / "prepared", **{name: object()})
