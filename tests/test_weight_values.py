"""Values in weight files: what is not finite, tied in one place only, or not the source's in a result."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from matt_fast import TrainingOptions, transfer
from matt_fast.model import weight_values
from matt_fast.model.checkpoint_files import stored_dtype
from matt_fast.model.teacher import Teacher
from matt_fast.model.weight_values import check_same_weights, check_values
from matt_fast.recipe import saving

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(folder, **tensors):
    """Store other tensors; "__" in a name stands for a dot."""
    file = folder / "model.safetensors"
    names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | names, file, metadata={"format": "pt"})


def check(folder, unused=(), told=lambda *x: None):
    check_values(Teacher(folder), unused, told)


@pytest.mark.parametrize("at_once", [1, 40, 1 << 24])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted_and_named(folder, monkeypatch, value, at_once):
    monkeypatch.setattr(weight_values, "AT_ONCE", at_once)
    told = []
    check(folder, told=lambda *x: told.append(x))
    count = len(load_file(folder / "model.safetensors"))
    assert told == [("tensors", i, count) for i in range(count + 1)]
    up, norm = load_file(folder / "model.safetensors")[UP], torch.ones(32)
    up[7, 3] = up[41, 0] = norm[31] = value
    change(folder, **{UP: up, "model.norm.weight": norm})
    with pytest.raises(ValueError, match="NaN or infinite values in") as error:
        check(folder)
    assert f"{UP} (2 values, the first in row 7), model.norm.weight (1 values, the first in row 31)" in str(error.value)
    check(folder, unused={UP, "model.norm.weight"})


def test_values_that_the_configuration_makes_infinite(folder):
    large = load_file(folder / "model.safetensors")[UP]
    large[5, 5] = 70000.0  # above the largest of float16, 65504
    change(folder, **{UP: large})
    check(folder)
    config = json.loads((folder / "config.json").read_text())
    for dtype in ("bfloat16", "float16"):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        assert stored_dtype(Teacher(folder)) == getattr(torch, dtype)
        if dtype == "float16":
            assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").get_parameter(UP).isinf().sum() == 1
            with pytest.raises(ValueError, match=r"up_proj.weight \(1 values, .*, too large for float16\)"):
                check(folder)
        else:
            check(folder)
    (folder / "config.json").write_text(json.dumps({x: y for x, y in config.items() if x != "dtype"}))
    assert stored_dtype(Teacher(folder)) == torch.float32


def test_weights_that_are_tied_in_the_configuration_only(folder):
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table.clone())
    check(folder)
    table[3, 3] += 1
    change(folder, lm_head__weight=table)
    with pytest.raises(
        ValueError, match=r'lm_head.weight and model.embed_tokens.weight .* "tie_word_embeddings": false'
    ):
        check(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    check(folder)


def test_pickled_weights_are_looked_at_too(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        check_values(Teacher(folder, allow_pickle=True), (), lambda *x: None)
    tensors[UP][0] = torch.nan
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"up_proj.weight \(32 values, the first in row 0\)"):
        check_values(Teacher(folder, allow_pickle=True), (), lambda *x: None)


@pytest.fixture
def result(folder, tmp_path):
    """A model made of the first by hand: more rows, all else as it is."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(61, mean_resizing=False)
    model.save_pretrained(tmp_path / "result", max_shard_size="20KB")
    assert len(list((tmp_path / "result").glob("*.safetensors"))) > 1
    return tmp_path / "result", model


def test_a_result_has_the_sources_other_weights_bit_for_bit(folder, result, monkeypatch):
    written, model = result
    check_same_weights(Teacher(folder), written, model)
    monkeypatch.setattr(weight_values, "AT_ONCE", 33)
    check_same_weights(Teacher(folder), written, model)
    for place in written.glob("*.safetensors"):
        tensors = load_file(place)
        if UP in tensors:
            tensors[UP].view(torch.int32)[9, 9] ^= 1  # the last bit
            save_file(tensors, place, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"wanted all weights outside the vocabulary .* these differ: {UP}$"):
        check_same_weights(Teacher(folder), written, model)


def test_signed_zeros_differ(folder, result):
    written, model = result
    change(folder, **{UP: torch.zeros(48, 32)})
    for place in written.glob("*.safetensors"):
        tensors = load_file(place)
        save_file({x: -torch.zeros_like(y) if x == UP else y for x, y in tensors.items()}, place, {"format": "pt"})
    with pytest.raises(ValueError, match="these differ"):
        check_same_weights(Teacher(folder), written, model)


def test_names_and_dtypes_that_transformers_changes(folder, result):
    """Older files have no body's name in front, or other names; a configuration may name another dtype."""
    written, model = result
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert check_same_weights(Teacher(folder), written, model) == []
    model = model.to(torch.bfloat16)
    model.save_pretrained(written, max_shard_size="20KB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (line,) = check_same_weights(Teacher(folder), written, model)
    told = f"{len(tensors)} tensors are bfloat16 now, as config.json has it, and were stored with more digits: "
    assert line.startswith(f"model.safetensors: {told}")


def test_experts_that_transformers_joins(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.resize_token_embeddings(61, mean_resizing=False)
    model.save_pretrained(tmp_path / "plain")
    check_same_weights(Teacher(tmp_path / "m"), tmp_path / "plain", model)
    model.save_pretrained(tmp_path / "joined", save_original_format=False)  # names that the source does not have
    check_same_weights(Teacher(tmp_path / "m"), tmp_path / "joined", model)
    name = next(x for x in model.state_dict() if "experts" in x)
    model.get_parameter(name).data[1, 2, 3] += 1
    model.save_pretrained(tmp_path / "joined", save_original_format=False)
    with pytest.raises(ValueError, match=f"these differ: {name}"):
        check_same_weights(Teacher(tmp_path / "m"), tmp_path / "joined", model)


@pytest.fixture
def job(tmp_path):
    save_tiny_model(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text(jsonl(TEXTS))
    return {
        "model": tmp_path / "teacher",
        "tokenizer": new_tokenizer(),
        "data": tmp_path / "data.jsonl",
        "output": tmp_path / "out",
        "max_length": 48,
        "batch_size": 2,
        "training": TrainingOptions(steps=1),
    }


def test_a_result_with_other_weights_is_not_published(job, monkeypatch):
    def spoil(model, vocabulary):
        model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
        return []

    monkeypatch.setattr(saving, "update_special_ids", spoil)
    with pytest.raises(ValueError, match=r"these differ: model.layers.2.mlp.up_proj.weight"):
        transfer(**job)
    assert [x.name for x in job["output"].iterdir()] == ["run"]
    assert (job["output"] / "run" / "trained").is_dir()
    monkeypatch.undo()
    transfer(**job, resume=True)
    assert (job["output"] / "config.json").exists()


def test_weights_are_looked_at_before_training(job):
    change(job["model"], **{"model.layers.2.mlp.up_proj.weight": torch.full((48, 32), torch.nan)})
    stages_seen = []
    with pytest.raises(ValueError, match=r"NaN or infinite values in .*model.layers.2.mlp.up_proj.weight \(1,536 val"):
        transfer(**job, on_stage=stages_seen.append)
    assert stages_seen == ["vocabulary", "checks"]
    assert not job["output"].exists()


def test_tensors_that_the_class_leaves_out_are_told(job):
    change(job["model"], mtp__layer__weight=torch.ones(3))
    told = []
    transfer(**job, on_message=told.append)
    assert "model: left out, as no part of LlamaForCausalLM: mtp.layer.weight" in told


def test_rows_that_the_stored_dtype_cannot_hold(job):
    AutoModelForCausalLM.from_pretrained(job["model"]).half().save_pretrained(job["model"])

    def far_away(weight, student_rows, matches, subtokens):
        rows = torch.zeros(student_rows, weight.shape[1])
        rows[300, 5] = 1e5
        return rows

    token = job["tokenizer"].convert_ids_to_tokens(300)
    with pytest.raises(ValueError, match="wanted input rows that are finite in float16") as error:
        transfer(**job, init=far_away)
    assert f"those of 1 tokens are not: {token!r}" in str(error.value)
