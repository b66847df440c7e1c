"""What a transfer refuses, before any work or at the first bad step."""

import shutil

import numpy as np
import pytest
import torch
from commands import run
from transformers import (
    AutoModelForCausalLM,
)

from matt_fast import TrainingOptions, transfer


def test_identical_tokenizers_are_refused(job):
    arguments, _ = job
    with pytest.raises(ValueError, match="tokenizer: wanted another than the model's own"):
        transfer(**arguments | {"tokenizer": arguments["model"]})
    assert not arguments["output"].exists()


def test_bad_input_is_refused_before_any_work_and_leaves_nothing(job, tmp_path):
    arguments, _ = job
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="output: wanted a new or empty folder"):
        transfer(**arguments | {"output": tmp_path / "full"})
    (tmp_path / "texts").mkdir()
    shutil.copy(arguments["data"], tmp_path / "texts")
    with pytest.raises(ValueError, match="output: wanted a folder outside of data"):
        transfer(**arguments | {"data": tmp_path / "texts", "output": tmp_path / "texts" / "output"})
    assert len(list((tmp_path / "texts").iterdir())) == 1
    shutil.rmtree(tmp_path / "texts")
    with pytest.raises(ValueError, match="n_layers: wanted 1 to 3 for this model, got 9"):
        transfer(**arguments, n_layers=9)
    with pytest.raises(ValueError, match="precision: wanted one of auto, no, bf16, got 'fp16'"):
        transfer(**arguments, precision="fp16")
    with pytest.raises(ValueError, match=r"model: .*full' could not be loaded as a model: wanted config\.json in it"):
        transfer(**arguments | {"model": tmp_path / "full"})
    (tmp_path / "empty.jsonl").write_text('{"text": " \\n"}')
    with pytest.raises(ValueError, match=r"^data: wanted text to train on .*1 documents without text\)$"):
        transfer(**arguments | {"data": tmp_path / "empty.jsonl"})
    (tmp_path / "empty.jsonl").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "full", "teacher", "tokenizer"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("objective", "aim2", "objective: wanted one or more of aim, aim_star, .* got 'aim2'"),
        ("objective", "aim+ntp+aim", r"objective: wanted each name once, got 'aim\+ntp\+aim'"),
        ("moments", "none", "moments: wanted one of lazy, dense, got 'none'"),
        ("warmup_steps", -1, "warmup_steps: wanted 0 or more, got -1"),
        ("decay_steps", 1001, "warmup_steps and decay_steps: wanted at most the 1000 steps together, got 0 and 1001"),
        ("warmup_steps", 1001, "wanted at most the 1000 steps together, got 1001 and 0"),
        ("steps", -1, "steps: wanted at least 0, got -1"),
        ("accumulation", 0, "accumulation: wanted at least 1, got 0"),
        ("lr", -1.0, "lr: wanted a number above 0, got -1.0"),
        ("max_grad_norm", 0, "max_grad_norm: wanted a number above 0, got 0"),
    ],
)
def test_training_options_are_checked_at_once(option, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**{option: value})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", "10", r"steps: wanted int, got '10' \(str\)"),
        ("steps", 10.5, "steps: wanted int, got 10.5"),
        ("decay_steps", 1.5, "decay_steps: wanted int or None, got 1.5"),
        ("objective", None, "objective: wanted str, got None"),
        ("lr", None, "lr: wanted float, got None"),
        ("max_grad_norm", "1", "max_grad_norm: wanted float or None, got '1'"),
        ("packing", "no", "packing: wanted bool, got 'no'"),
    ],
)
def test_training_options_have_types(option, value, message):
    with pytest.raises(TypeError, match=message):
        TrainingOptions(**{option: value})
    assert TrainingOptions(lr=1, steps=np.int64(3)).steps == 3


@pytest.mark.parametrize(("option", "value"), [("metric", "cosine"), ("reduction", "documents")])
def test_options_of_the_aim_loss_are_refused_where_there_is_none(job, option, value):
    for objective in ("token-distillation", "ntp+boundary-head"):
        with pytest.raises(ValueError, match=f"{option}: wanted .* with an objective that has no AIM loss"):
            TrainingOptions(objective=objective, **{option: value})
    TrainingOptions(objective="ntp+aim_star", **{option: value})
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data", "output")]
    failed = run("transfer", *paths, f"--{option}={value}")
    assert failed.exit_code == 1
    assert f"{option}: wanted" in failed.output


def test_a_loss_that_is_not_finite_ends_with_an_error_and_no_model(job, tmp_path):
    arguments, _ = job
    broken = AutoModelForCausalLM.from_pretrained(arguments["model"])
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)  # finite, but not what it gives
    broken.save_pretrained(arguments["model"])
    with pytest.raises(FloatingPointError, match=r"not finite at step 1.*segments that differ between the two sides"):
        transfer(**arguments, n_layers=2)
    assert [path.name for path in arguments["output"].iterdir()] == ["run"]
    with pytest.raises(FileExistsError, match="a run that is not finished; go on with it: matt-fast transfer --resume"):
        transfer(**arguments, n_layers=2)


def test_pickled_weights_are_off_unless_asked_for(job, tmp_path):
    arguments, _ = job
    model = AutoModelForCausalLM.from_pretrained(arguments["model"])
    (arguments["model"] / "model.safetensors").unlink()
    torch.save(model.state_dict(), arguments["model"] / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        transfer(**arguments)
    transfer(**arguments, allow_pickle=True)
