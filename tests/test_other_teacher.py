"""Learning from another model than the student's own."""

import shutil
from dataclasses import replace

import pytest
from test_runs import digests, files  # noqa: F401, a fixture
from tiny import TEXTS, byte_level, save_tiny_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from matt_fast import HealingOptions, TrainingOptions, transfer


@pytest.fixture
def job(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name}
    training = TrainingOptions(objective="alm+boundary-kl", steps=3, lr=1e-2)
    return given | {"output": tmp_path / "output", "training": training}


def test_a_copy_of_the_model_teaches_what_the_model_itself_does(job, tmp_path):
    shutil.copytree(job["model"], tmp_path / "copy")
    alone = transfer(**job | {"output": tmp_path / "alone"})
    with_copy = transfer(**job | {"teacher": tmp_path / "copy"})
    assert with_copy.progress.losses == alone.progress.losses
    assert digests(job["output"]) == digests(tmp_path / "alone")


def test_a_larger_model_with_a_tokenizer_of_its_own(job, tmp_path):
    """Another width, depth and vocabulary; both stages learn from it, and only the student is written."""
    save_tiny_model(
        tmp_path / "other",
        GPTNeoXConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4),
    )
    other = byte_level(TEXTS, 300, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    healing = HealingOptions(steps=12, objective="boundary-kl", lr=1e-2, rows_lr=1e-2, rank=4)
    result = transfer(**job | {"teacher": tmp_path / "other", "healing": healing, "max_length": 64})
    losses = result.healing.progress.losses
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    written, own = (AutoModelForCausalLM.from_pretrained(x).config for x in (job["output"], job["model"]))
    assert (written.hidden_size, written.num_hidden_layers) == (own.hidden_size, own.num_hidden_layers)


@pytest.mark.parametrize("objective", ["aim", "token-distillation+alm", "boundary-head"])
def test_objectives_that_compare_the_inside_are_refused(job, objective):
    with pytest.raises(ValueError, match="teacher: wanted objectives that compare what two models predict"):
        transfer(**job | {"teacher": job["model"], "training": replace(job["training"], objective=objective)})
    with pytest.raises(FileNotFoundError, match="teacher: wanted a file or folder that is there"):
        transfer(**job | {"teacher": "/no/such/folder"})
