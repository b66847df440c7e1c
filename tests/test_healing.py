"""Layers trained together with the rows: what is trained, what is written, and that a stopped run goes on."""

import json
import re
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from test_runs import Stop, digests, files, stop_at  # noqa: F401, a fixture
from tiny import save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
)

from matt_fast import HealingOptions, TrainingOptions, sweep_layers, transfer
from matt_fast.recipe.watching import RunWatcher
from matt_fast.training.layers import TrainedLayers

LORA = HealingOptions(steps=4, lr=1e-2, rows_lr=1e-2, rank=3, objective="ntp")
METHODS = {
    "lora": LORA,
    "outer": replace(LORA, method="outer", outer_layers=1, objective="alm+boundary-kl"),
    "full": replace(LORA, method="full", objective="boundary-kl"),
}


@pytest.fixture
def job(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name}
    training = TrainingOptions(objective="aim", steps=2, lr=1e-2)
    return given | {"output": tmp_path / "output", "training": training, "checkpoint_every": 2, "healing": LORA}


@pytest.fixture
def own_accelerator():
    """A precision that other tests in this process do not have."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def trained(name: str, method: str, layers: int) -> bool:
    """By the names that a Llama's parameters have."""
    number = name.split("layers.")[1].split(".")[0] if "layers." in name else ""
    return {
        "lora": name.endswith("_proj.weight"),
        "outer": number in ("0", str(layers - 1)),
        "full": "embed_tokens" not in name and "lm_head" not in name,
    }[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits_and_changes_what_it_should(job, method):
    job |= {"healing": METHODS[method]}
    expected = transfer(**job | {"output": job["output"].with_name("alone")})
    stages, state = [], {"healing": False}

    def on_stage(stage: str) -> None:
        stages.append(stage)
        state["healing"] = stage == "healing"

    def on_step(progress) -> None:
        if state["healing"] and progress.step == 3:
            raise Stop

    with pytest.raises(Stop):
        transfer(**job, on_stage=on_stage, on_step=on_step)
    del stages[:]
    found = transfer(**job, resume=True, on_stage=on_stage)
    assert "training" not in stages
    assert "healing" in stages
    assert found.healing.progress.losses == expected.healing.progress.losses
    assert len(found.healing.progress.losses) == 4
    assert digests(job["output"]) == digests(expected.output)
    assert (job["output"] / "run" / "healing.jsonl").read_text().count("\n") == 4
    assert transfer(**job, resume=True).healing.progress.losses == expected.healing.progress.losses

    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (job["model"], job["output"]))
    old, new = before.state_dict(), after.state_dict()
    names = [name for name in new if "embed_tokens" not in name and "lm_head" not in name]
    depth = before.config.num_hidden_layers
    assert any(trained(name, method, depth) for name in names)
    for name in names:
        assert torch.equal(old[name], new[name]) != trained(name, method, depth), name
    card = (job["output"] / "README.md").read_text()
    assert f"{found.healing.trained_numbers:,} numbers" in card
    assert "those of the original model." not in card


@pytest.mark.parametrize("more", [{"precision": "bf16"}, {"quantization": "4bit"}], ids=str)
def test_layers_in_fewer_bits(job, more, own_accelerator):
    """Half precision and quantised layers: float32 copies are what is trained, and a stopped run has the same bits."""
    training = replace(job["training"], steps=0, alm_temperature=7.0, quantization=more.get("quantization"))
    job |= {"training": training, "healing": replace(LORA, objective="alm"), "precision": more.get("precision", "no")}
    expected = transfer(**job | {"output": job["output"].with_name("alone")})
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(3))
    assert transfer(**job, resume=True).healing.progress.losses == expected.healing.progress.losses
    assert digests(job["output"]) == digests(expected.output)
    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (job["model"], job["output"]))
    names = [name for name in before if "embed_tokens" not in name and "lm_head" not in name]
    changed = [name for name in names if not torch.equal(before[name], after[name])]
    assert changed
    assert all(trained(name, "lora", 3) for name in changed)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}
ATTENTION = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
ARCHITECTURES = {  # what LoRA changes in a layer
    "llama": (LlamaConfig(**HEADS), ATTENTION | {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}),
    "experts and a router that are parameters": (
        MixtralConfig(**EXPERTS),
        ATTENTION | {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    ),
    "a router that is a kind of linear layer": (
        Llama4TextConfig(**EXPERTS, head_dim=8, intermediate_size_mlp=24),
        ATTENTION | {f"feed_forward.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")},
    ),
    "stored the other way round": (
        GPT2Config(n_embd=16, n_layer=2, n_head=2),
        {f"{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    ),
    "weights that kernels take": (
        MambaConfig(**SIZES, state_size=4),
        {f"mixer.{x}_proj.weight" for x in ("in", "x")},
    ),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_adapter_that_is_kept_is_what_was_merged(job, tmp_path, kind):
    config, expected = ARCHITECTURES[kind]
    save_tiny_model(tmp_path / "model", config)
    job |= {"model": tmp_path / "model", "training": TrainingOptions(steps=0)}
    job |= {"healing": replace(LORA, keep_adapter=True)}
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(3))
    transfer(**job, resume=True)
    merged = AutoModelForCausalLM.from_pretrained(job["output"])
    apart = AutoModelForCausalLM.from_pretrained(job["model"])
    apart.resize_token_embeddings(len(merged.get_input_embeddings().weight))
    apart.get_input_embeddings().weight.data.copy_(merged.get_input_embeddings().weight)
    if not apart.config.tie_word_embeddings:
        apart.get_output_embeddings().weight.data.copy_(merged.get_output_embeddings().weight)
    apart = PeftModel.from_pretrained(apart, job["output"] / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(job["output"])("def function_alpha(self):", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(merged(ids).logits, apart(ids).logits, rtol=1e-4, atol=1e-5)

    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (job["model"], job["output"]))
    inside = {name: re.split(r"(?:layers|h)\.\d+\.", name)[-1] for name in before if re.search(r"\.\d+\.", name)}
    assert {x for name, x in inside.items() if not torch.equal(before[name], after[name])} == expected


def test_validation_keeps_the_best_rows_and_layers(files, job, monkeypatch):  # noqa: F811
    """The first of two validations is made the better one: the result is what was there behind its step."""
    figures = iter([[5.0], [1.0], [2.0]])
    monkeypatch.setattr("matt_fast.recipe.watching.RunWatcher._bits", lambda *_: next(figures))
    step, saved = TrainedLayers.step, TrainedLayers.save
    history, written = [], {}

    def keep_step(self, *given):
        step(self, *given)
        history.append(self.weights())

    def keep_saved(self, folder):
        written.update(self.weights())
        saved(self, folder)

    monkeypatch.setattr(TrainedLayers, "step", keep_step)
    monkeypatch.setattr(TrainedLayers, "save", keep_saved)
    job |= {name: value for name, value in files.items() if "eval" in name}
    result = transfer(**job | {"validate_every": 2})
    assert (result.healing.best_step, result.healing.validation) == (2, [(2, 1.0), (4, 2.0)])
    for name, weights in written.items():
        assert torch.equal(weights, history[1][name])
        assert not torch.equal(weights, history[3][name])
    assert written


@pytest.mark.parametrize(
    ("healing", "training", "message"),
    [
        (replace(LORA, method="outer", outer_layers=2), {}, "outer_layers: wanted 1 to 1 at either end"),
        (replace(LORA, objective="boundary-head"), {}, "heal_objective: wanted one that runs the student's layers"),
        (LORA, {"offload": "disk", "checkpointing": True}, "heal and offload: wanted one of them"),
        (
            replace(LORA, objective="aim-all-layers"),
            {"checkpointing": True},
            "checkpointing: wanted an objective other",
        ),
        (LORA, {"alm_temperature": 7.0}, "alm_temperature: wanted 100.0 with objectives without alm"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_anything_is_made(job, healing, training, message):
    with pytest.raises(ValueError, match=message):
        transfer(**job | {"healing": healing, "training": replace(job["training"], **training)})
    assert not (job["output"] / "run" / "rows").exists()
    for wrong, expected in (
        ({"method": "some"}, "heal: wanted one of lora, outer, full"),
        ({"rank": 0}, "heal_rank: wanted at least 1"),
        ({"lr": 0.0}, "heal_lr: wanted a number above 0"),
        ({"objective": "kl"}, "heal_objective: wanted one or more of"),
        ({"method": "full", "keep_adapter": True}, "keep_adapter: wanted heal='lora' with it"),
    ):
        with pytest.raises(ValueError, match=expected):
            HealingOptions(**wrong)


def test_healing_stops_where_a_further_text_becomes_worse(files, job, monkeypatch):  # noqa: F811
    """Its bits per byte are made to go up behind the first validation: what was there then is the result."""
    texts = {"german": files["eval_data"], "english": files["eval_data"]}
    given = iter([[5.0, 5.0], [3.0, 1.0], [2.0, 1e6]])
    monkeypatch.setattr("matt_fast.recipe.watching.RunWatcher._bits", lambda *_: next(given))
    messages = []
    job |= {"eval_data": texts, "eval_pieces": 2, "validate_every": 1, "training": replace(job["training"], steps=1)}
    result = transfer(**job, on_message=messages.append)
    assert (result.healing.best_step, len(result.healing.progress.losses)) == (1, 2)
    assert any("Stops at step 2: on 'english' the model became worse" in x for x in messages)
    assert set(result.other_texts) == {"english"}
    assert result.other_texts["english"] == result.evaluations  # the same text
    lines = (job["output"] / "run" / "healing.jsonl").read_text().splitlines()
    assert '"bits_per_byte/english": 1000000.0' in lines[-1]
    card = (job["output"] / "README.md").read_text()
    assert result.text == "german"
    assert all(f"| {name}: after training |" in card for name in ("german", "english"))


@pytest.mark.parametrize("steps", [0, 2])
def test_layers_that_only_get_worse_are_left_as_they_were(files, job, monkeypatch, steps):  # noqa: F811
    """Healing is made to be worse than any start; with rows that trained before, and without."""
    monkeypatch.setattr(RunWatcher, "_bits", lambda _, state: [1e-3 if state.layers is None else 1e3])
    held_out = {name: value for name, value in files.items() if "eval" in name}
    given = job | held_out | {"training": replace(job["training"], steps=steps), "validate_every": 2}
    result = transfer(**given)
    alone = transfer(**given | {"healing": None, "output": job["output"].with_name("alone")})
    assert (result.best_step, result.healing.best_step) == (2 if steps else None, 0)
    before, after = (AutoModelForCausalLM.from_pretrained(x.output).state_dict() for x in (alone, result))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_healing_from_rows_as_they_start(job):
    """No step for the rows alone; and neither: then the result is the start."""
    healed = transfer(**job | {"training": replace(job["training"], steps=0)})
    assert (healed.progress.step, healed.healing.progress.step) == (0, 4)
    start = job["output"].with_name("start")
    alone = transfer(**job | {"output": start, "training": replace(job["training"], steps=0), "healing": None})
    assert (alone.progress.step, alone.healing) == (0, None)
    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (job["model"], start))
    assert all(torch.equal(before[x], after[x]) for x in before if "embed_tokens" not in x and "lm_head" not in x)
    assert "were made of those of the old ones" in (start / "README.md").read_text()


def test_a_sweep_over_layers_heals_nothing(job, tmp_path):
    arguments = {name: job[name] for name in ("model", "tokenizer", "data")}
    with pytest.raises(ValueError, match="heal: wanted none with a sweep over layers"):
        sweep_layers(**arguments, eval_data=job["data"], output=tmp_path / "sweep", healing=LORA)
    assert not (tmp_path / "sweep").exists()


def test_rows_that_healing_leaves_alone_stay_as_training_made_them(files, tmp_path):  # noqa: F811
    """Output rows of their own are trained by one stage, input rows by the other; both are in the result."""
    given = {name: value for name, value in files.items() if "eval" not in name} | {"untie": True}
    training = TrainingOptions(objective="boundary-head", steps=3, lr=1e-2)
    results = {}
    for name, healing in (("rows", None), ("healed", replace(LORA, objective="token-distillation"))):
        results[name] = transfer(**given, output=tmp_path / name, training=training, healing=healing)
    rows, healed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in results)
    assert torch.equal(rows.get_output_embeddings().weight, healed.get_output_embeddings().weight)
    assert not torch.equal(rows.get_input_embeddings().weight, healed.get_input_embeddings().weight)
    lines = [(tmp_path / name / "token_provenance.jsonl").read_text().splitlines() for name in results]
    seen = [sum(json.loads(line)["seen"] for line in part) for part in lines]
    assert seen[1] > seen[0] > 0
    assert results["healed"].seen >= results["rows"].seen


class Operations(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **options or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_adamw_in_as_few_operations_for_many_adapters_as_for_few(dtype):
    counts = []
    for depth in (1, 5):
        torch.manual_seed(0)
        sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_key_value_heads": 3}
        config = LlamaConfig(vocab_size=7, num_hidden_layers=depth, **sizes)
        layers = TrainedLayers(LlamaForCausalLM(config).to(dtype), HealingOptions(rank=3, lr=1e-2))
        masters, adamw = {x: y.clone() for x, y in layers.masters.items()}, {}
        for step in (1, 2):
            for parameter in layers._parameters.values():
                parameter.grad = torch.randn_like(parameter)
            kept = {name: x.grad.float() for name, x in layers._parameters.items()}
            with Operations() as operations:
                gradients = layers.gradients()
                layers.step(gradients, 1e-2)
            for name, gradient in kept.items():  # torch.optim.AdamW's own formula
                first, second = adamw.get(name, (torch.zeros(()), torch.zeros(())))
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                adamw[name] = first, second
                change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                masters[name] = masters[name] - 1e-2 * change
        counts.append(operations.count - len(masters) * (dtype != torch.float32))  # a place for each gradient
        for name, parameter in layers._parameters.items():
            torch.testing.assert_close(layers.masters[name], masters[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(parameter, layers.masters[name].to(dtype))
    assert counts[0] == counts[1] < 30
