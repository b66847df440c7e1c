"""A tied model that gets an output head of its own."""

import pytest
import torch
from safetensors import safe_open
from test_runs import Stop, digests, files, stop_at  # noqa: F401, a fixture
from transformers import AutoModelForCausalLM

from matt_fast import HealingOptions, TrainingOptions, transfer
from matt_fast.model.teacher import Teacher


@pytest.fixture
def job(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name}
    training = TrainingOptions(objective="token-distillation+boundary-head", steps=4, lr=1e-2)
    return given | {"output": tmp_path / "output", "training": training, "untie": True, "checkpoint_every": 2}


def test_an_untied_model_computes_what_the_tied_one_does(files):  # noqa: F811
    ids = torch.arange(3, 20)[None]
    for n_layers in (None, 2):
        tied, untied = (Teacher(files["model"], untie=x).load(torch.float32, n_layers) for x in (False, True))
        assert torch.equal(tied(ids).logits, untied(ids).logits)
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
        untied.resize_token_embeddings(300)
        assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    size = Teacher(files["model"], untie=True).outline(torch.float32).num_parameters()
    table = tied.get_input_embeddings().weight.numel()
    assert size == Teacher(files["model"]).outline(torch.float32).num_parameters() + table


def test_rows_learn_apart_and_the_result_loads_untied(job):
    said = []
    result = transfer(**job, on_message=said.append)
    model = AutoModelForCausalLM.from_pretrained(job["output"])
    numbers = model.get_output_embeddings().weight.numel()
    size = f"{numbers * model.dtype.itemsize / 1024:.0f} KiB"
    assert [x for x in said if x.startswith("untie: ")] == [
        f"untie: the output head becomes a table of its own, {numbers:,} numbers more ({size} in the result's files)"
    ]
    assert not model.config.tie_word_embeddings
    rows = [table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert rows[0] is not rows[1]
    assert 0 < (rows[0] != rows[1]).any(1).sum() <= result.new
    with safe_open(job["output"] / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
    before = AutoModelForCausalLM.from_pretrained(job["model"]).state_dict()
    after = model.state_dict()
    assert all(torch.equal(before[x], after[x]) for x in before if "embed_tokens" not in x and "lm_head" not in x)


def test_a_stopped_run_goes_on_to_the_same_bits(job):
    job |= {"healing": HealingOptions(steps=3, objective="ntp", rank=2)}
    transfer(**job | {"output": job["output"].with_name("alone")})
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(3))
    transfer(**job, resume=True)
    assert digests(job["output"]) == digests(job["output"].with_name("alone"))
