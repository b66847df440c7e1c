"""Frozen layers in 8 and 4 bits or off the device, against the same models with plain weights."""

import gc
import json
import subprocess
import sys
import tempfile

import commands
import numpy as np
import pytest
import torch
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from matt_fast import TrainingOptions, transfer
from matt_fast.model.capture import capture
from matt_fast.model.layers import decoder_layers
from matt_fast.model.teacher import Teacher
from matt_fast.planning.simulation import FullRows, Memory, as_on_a_device
from matt_fast.training import frozen
from matt_fast.training.frozen import load_frozen
from matt_fast.training.loop import freeze

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SIZES, tie_word_embeddings=False),  # with biases
}
QUANTIZED = [TrainingOptions(quantization=x, checkpointing=y) for x in ("8bit", "4bit") for y in (False, True)]
OFFLOADED = TrainingOptions(offload="disk", checkpointing=True)


@pytest.fixture(params=CONFIGS)
def source(request, tmp_path):
    save_tiny_model(tmp_path / "teacher", CONFIGS[request.param])
    return Teacher(tmp_path / "teacher")


def both_sides(model, checkpointing: bool):
    """The teacher's states, and the student's with the gradient of their inputs: in training's order, twice."""
    ids = torch.arange(40).reshape(2, 20)
    for _ in range(2):
        with torch.no_grad():
            teacher = capture(model, hidden=1, input_ids=ids).hidden
        embedded = model.get_input_embeddings()(ids.flip(0)).detach().requires_grad_()
        given = capture(model, hidden=1, attention=[1], inputs_embeds=embedded, checkpointing=checkpointing)
        (given.hidden.square().mean() + given.attention[1].key.square().mean()).backward()
    return teacher, given.hidden.detach(), embedded.grad


def dequantised(linear: nn.Module) -> torch.Tensor:
    """The weights that a quantised layer stands for, by the definition of its format."""
    if type(linear).__name__ == "Linear8bitLt":
        integers, scales = (linear.weight.CB, linear.weight.SCB)
        if integers is None:
            integers, scales = linear.state.CB, linear.state.SCB
        return integers.float() * scales[:, None] / 127
    state = linear.weight.quant_state
    packed = linear.weight.data.flatten()
    places = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return (state.code[places].reshape(-1, 64) * state.absmax[:, None]).reshape(state.shape)


@pytest.mark.parametrize("options", QUANTIZED, ids=lambda x: f"{x.quantization}-{x.checkpointing}")
def test_quantised_layers_are_plain_ones_with_those_weights(source, options):
    model = load_frozen(source, torch.float32, 2, options, CPU)
    freeze(model)
    plain = source.load(torch.float32, 2)
    freeze(plain)
    assert model.get_input_embeddings().weight.equal(plain.get_input_embeddings().weight)
    assert model.get_output_embeddings().weight.equal(plain.get_output_embeddings().weight)
    assert len(decoder_layers(model)) == 2
    count = 0
    for name, module in decoder_layers(plain).named_modules():
        if isinstance(module, nn.Linear):
            weight = dequantised(decoder_layers(model).get_submodule(name))
            assert 0 < (weight - module.weight).norm() < 0.2 * module.weight.norm()
            module.weight.data = weight
            count += 1
    assert count == (14 if "llama" in type(plain).__name__.lower() else 8)
    for found, expected in zip(both_sides(model, options.checkpointing), both_sides(plain, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_offloaded_layers_compute_the_same_and_are_gone_afterwards(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load_frozen(source, torch.float32, 2, OFFLOADED, CPU)
    assert len(list(tmp_path.glob(".matt-fast-*"))) == 1
    freeze(model)
    plain = source.load(torch.float32, 2)
    freeze(plain)
    for found, expected in zip(both_sides(model, True), both_sides(plain, True), strict=True):
        assert torch.equal(found, expected)
    assert {x.device.type for x in decoder_layers(model).parameters()} == {"meta"}
    assert model.get_input_embeddings().weight.device.type == "cpu"
    del model
    gc.collect()
    assert not list(tmp_path.glob(".matt-fast-*"))


@pytest.fixture
def job(tmp_path):
    save_tiny_model(tmp_path / "teacher", CONFIGS["llama"])
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(jsonl(TEXTS))
    paths = {"model": tmp_path / "teacher", "tokenizer": tmp_path / "tokenizer", "data": corpus}
    return paths | {"max_length": 48, "batch_size": 2, "n_layers": 2, "precision": "no"}


def run(job, tmp_path, name: str, **options):
    training = TrainingOptions(objective="aim+ntp", steps=3, lr=1e-2, **options)
    done = transfer(**job, output=tmp_path / name, training=training)
    return done.progress.losses, AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_a_transfer_writes_the_original_layers(job, tmp_path):
    plain_losses, plain = run(job, tmp_path, "plain")
    teacher = AutoModelForCausalLM.from_pretrained(job["model"])
    for name, options in (
        ("8bit", {"quantization": "8bit"}),
        ("4bit", {"quantization": "4bit"}),
        ("disk", {"offload": "disk", "checkpointing": True}),
    ):
        losses, model = run(job, tmp_path, name, **options)
        assert losses == pytest.approx(plain_losses, rel=0 if name == "disk" else 0.1)
        assert (losses == plain_losses) == (name == "disk")
        assert not hasattr(model.config, "quantization_config")
        for parameter, original in teacher.named_parameters():
            if "embed_tokens" not in parameter:
                assert torch.equal(model.get_parameter(parameter), original), parameter
        moved = [x.get_input_embeddings().weight for x in (model, plain)]
        assert torch.equal(*moved) == (name == "disk")
        assert f"--{next(iter(options))} {name} " in (tmp_path / name / "README.md").read_text()


def test_rows_from_the_states_of_quantised_and_offloaded_layers(job, tmp_path):
    for options in ({"quantization": "4bit"}, {"offload": "disk", "checkpointing": True}):
        training = TrainingOptions(steps=1, **options)
        output = tmp_path / next(iter(options))
        assert transfer(**job, output=output, init="contextual", training=training).report.initialized > 0


@pytest.mark.parametrize(
    "options",
    [TrainingOptions(checkpointing=True), *QUANTIZED, OFFLOADED],
    ids=lambda x: f"{x.quantization or x.offload}-{x.checkpointing}",
)
def test_the_plan_of_a_students_pass(tmp_path, options):
    """Allocations of a pass there and back: what the meta device's stand-ins take is what the real layers take."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, vocab_size=300
    )
    save_tiny_model(tmp_path / "teacher", config)
    source = Teacher(tmp_path / "teacher")
    batch, length = 2, 128

    def passes(model):
        embedded = torch.zeros(batch, length, 256, device=model.device, dtype=model.dtype, requires_grad=True)
        capture(model, hidden=3, inputs_embeds=embedded, checkpointing=options.checkpointing).hidden.sum().backward()

    dtype = torch.float32 if options.offload is None else torch.bfloat16  # converted, or it stays in the file's pages
    real = load_frozen(source, dtype, None, options, CPU)
    freeze(real)
    outline = source.outline(dtype)
    freeze(outline)
    measured = measured_peak(lambda: passes(real), 4 * sum(x.numel() for x in outline.parameters()))
    frozen.outline_frozen(outline, options.quantization, options.offload, "cpu")
    assert predicted_peak(outline, passes) == pytest.approx(measured, rel=0.1)


def predicted_peak(outline, passes) -> int:
    memory = Memory("weights")
    for tensor in (*outline.parameters(), *outline.buffers()):
        memory.add(tensor)
    memory.part = "passes"
    with FullRows(), as_on_a_device(), memory:
        passes(outline)
    return memory.peak["passes"]


def measured_peak(step, mapped: int) -> int:
    """What the allocator handed out at most, but for files of `mapped` bytes, of which it sees all for each tensor."""
    step()
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    return np.cumsum([x for x in sizes if abs(x) < 0.9 * mapped]).max()


def test_the_peak_of_a_process_falls(tmp_path):
    """Each in a process of its own: eight layers whose weights are 136 MiB, of which one at a time is there."""
    program = f"""
import os, psutil, torch
from matt_fast import TrainingOptions
from matt_fast.model.capture import capture
from matt_fast.training.frozen import load_frozen
from matt_fast.model.teacher import Teacher
from matt_fast.training.loop import freeze

def look(offload):
    options = TrainingOptions(checkpointing=True, offload=offload)
    in_use = lambda *rest: found.append(psutil.Process().memory_info().rss)
    found = []
    in_use()
    model = load_frozen(Teacher({str(tmp_path / "teacher")!r}), torch.float32, None, options, torch.device("cpu"))
    freeze(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(in_use)  # in the passes there and back
    for _ in range(2):
        embedded = torch.zeros(1, 16, 512, requires_grad=True)
        capture(model, hidden=7, inputs_embeds=embedded, checkpointing=True).hidden.sum().backward()
    print(max(found) - found[0], len(found), flush=True)

for offload in (None, "disk"):
    child = os.fork()  # with all that is imported
    if not child:
        look(offload)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    config = LlamaConfig(hidden_size=512, intermediate_size=2176, num_hidden_layers=8, num_attention_heads=8)
    save_tiny_model(tmp_path / "teacher", config)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (whole, *counts), (spread, *others) = (map(int, line.split()) for line in done.stdout.splitlines()[-2:])
    assert counts == others == [1 + 2 * 2 * 8]
    assert whole - spread > 0.5 * 136 * 2**20, (whole, spread)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "2bit"}, "quantization: wanted one of 8bit, 4bit, got '2bit'"),
        ({"offload": "gpu"}, "offload: wanted one of cpu, disk, got 'gpu'"),
        ({"offload": "disk"}, "offload: wanted checkpointing with it"),
        ({"offload": "disk", "checkpointing": True, "quantization": "8bit"}, "quantization and offload: wanted one"),
        ({"quantization": "4bit", "compile": True}, "quantization and compile: wanted one of them"),
        ({"offload": "disk", "checkpointing": True, "compile": True}, "offload and compile: wanted one of them"),
    ],
    ids=str,
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


def test_refused_before_any_work(job, tmp_path, monkeypatch):
    arguments = job | {"output": tmp_path / "output"}
    with pytest.raises(ValueError, match="offload: wanted 'disk' where the model runs on the CPU, got 'cpu'"):
        transfer(**arguments, training=TrainingOptions(offload="cpu", checkpointing=True))
    quantized = TrainingOptions(quantization="4bit")
    monkeypatch.setattr(frozen, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes: .*pip install .bitsandbytes>="):
        transfer(**arguments, training=quantized)
    config = json.loads((job["model"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (job["model"] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization: wanted a model whose weights are not quantised yet"):
        transfer(**arguments, training=quantized)
    assert not (tmp_path / "output").exists()


def test_the_command_line(job, tmp_path):
    named = [f"--{name.replace('_', '-')}={job[name]}" for name in ("model", "tokenizer", "data")]
    named += [f"--output={tmp_path / 'output'}", "--steps=1", "--layer=2"]
    done = commands.run("transfer", *named, "--quantization=4bit", "--max-length=48")
    assert done.exit_code == 0, done.output
    done = commands.run("transfer", *named, "--offload=disk")
    assert done.exit_code == 1
    assert "offload: wanted checkpointing with it" in done.output.replace("\n", " ")
    done = commands.run("plan", *named[:2], "--quantization=8bit", "--device=cpu")
    assert done.exit_code == 0, done.output
