"""Learning from another model than the student's own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_runs import digests, files  # noqa: F401, a fixture
from tiny import TEXTS, byte_level, save_tiny_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from matt_fast import HealingOptions, TrainingOptions, transfer
from matt_fast.cli.display import report_lines


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


def test_a_result_trains_on_with_the_original_as_its_teacher(job, files, tmp_path):  # noqa: F811
    """It is as good as the first training left it where the second begins, and the same rows are trained."""
    healing = HealingOptions(steps=3, objective="segment-kl", lr=1e-2, rows_lr=1e-2, rank=4)
    given = job | {"healing": healing, "eval_data": files["eval_data"]}
    first = transfer(**given | {"output": tmp_path / "first"})
    more = given | {"model": tmp_path / "first", "tokenizer": tmp_path / "first", "teacher": job["model"]}
    more |= {"training": TrainingOptions(steps=0), "output": tmp_path / "more"}
    result = transfer(**more)
    for name in ("original", "initialised"):
        assert result.evaluations[name] == first.evaluations["trained"]
    before, after, original = (
        AutoModelForCausalLM.from_pretrained(x).get_input_embeddings().weight.detach()
        for x in (tmp_path / "first", tmp_path / "more", job["model"])
    )
    entries = [json.loads(line) for line in (tmp_path / "more" / "token_provenance.jsonl").open()]
    first_entries = [json.loads(line) for line in (tmp_path / "first" / "token_provenance.jsonl").open()]
    shared = [entry for entry in first_entries if entry["start"].startswith("copied")]
    assert 0 < len(shared) < len(entries)
    assert [x["id"] for x in entries if x["start"].startswith("copied")] == [x["id"] for x in shared]
    assert all(torch.equal(after[x["id"]], original[x["teacher_ids"][0]]) for x in shared)
    moved = (before != after).any(1).nonzero()[:, 0].tolist()
    assert moved == [x["id"] for x in entries if x["trained"] and x["seen"]]
    assert moved
    own = [x for x in entries if x["start"] == "its own row"]
    assert len(own) == result.report.own == result.new == len(entries) - len(shared) > 0
    assert result.report.initialized == result.report.subtoken_mean == result.report.unspelled == 0
    card, page = ((tmp_path / "more" / name).read_text() for name in ("README.md", "report.html"))
    assert "# `first` trained on" in card
    assert f"- The teacher was `{Path(job['model']).name}`." in card
    assert "The teacher was" not in (tmp_path / "first" / "README.md").read_text()
    assert "the tokenizer of `first` stayed. Adapters of low rank" in card
    assert f"- {result.new} more have rows that train on." in card
    assert "was replaced" in (tmp_path / "first" / "README.md").read_text()
    assert "keeps its tokenizer, and trains on" in page
    assert "first trained on" in page
    assert "with a new tokenizer" not in page
    assert report_lines(result.report)[0].startswith(f"{result.shared} shared, {result.new} train on from the model")
    with pytest.raises(ValueError, match="init: wanted mean and no init_head with a tokenizer that the model has"):
        transfer(**more | {"init": "first-piece", "output": tmp_path / "other"})
    with pytest.raises(ValueError, match="there is nothing to transfer"):
        transfer(**more | {"model": job["model"], "tokenizer": job["model"], "output": tmp_path / "other"})
