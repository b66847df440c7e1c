"""The plan against brute force: parameters, what autograd keeps, and the peak of real steps of tiny models."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from commands import run
from test_capture import CONFIGS, GROUPED, SIZES
from test_loss import allocations
from tiny import new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, JambaConfig, LlamaConfig, MixtralConfig, ModernBertConfig

from matt_fast import HealingOptions, TrainingOptions, plan
from matt_fast.data.batches import collate
from matt_fast.data.packing import Chunk
from matt_fast.model.capture import capture
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.head import Head
from matt_fast.planning.plan import _largest
from matt_fast.planning.simulation import FullRows, Vocabulary, as_on_a_device, simulate, with_many_continuations
from matt_fast.support.units import GIB
from matt_fast.training.layers import TrainedLayers
from matt_fast.training.loop import freeze, train
from matt_fast.training.objectives import trains_output
from matt_fast.training.sides import Student, Target
from matt_fast.training.state import TrainingState

LAYERS, LENGTH, BATCH = 3, 60, 2
OBJECTIVES = ["token-distillation", "aim", "aim_star", "aim-all-layers", "boundary-head", "ntp", "aim+ntp"]
OBJECTIVES += ["segment-kl"]
MODELS = CONFIGS | {"mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)}


def model_of(name: str, device: str = "cpu", dtype=torch.float32):
    implementation = "eager" if name == "gemma2" else "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            deepcopy(MODELS[name]), attn_implementation=implementation, dtype=dtype
        )
    freeze(model)
    return model


def trunk_of(model, options: TrainingOptions):
    return model if trains_output(options.objectives()) else model.get_decoder()


def storages(tensors) -> dict[int, int]:
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


def kept_for_backward(model, **options) -> int:
    """Bytes of all that autograd keeps of a pass, the weights aside."""
    embedded = torch.zeros(BATCH, LENGTH, SIZES["hidden_size"], device=model.device, requires_grad=True)
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        given = capture(model, hidden=LAYERS - 1, inputs_embeds=embedded, **options)  # noqa: F841, holds the graph
    weights = storages([*model.parameters(), *model.buffers(), embedded])
    return sum(size for key, size in storages(kept).items() if key not in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_meta_device_keeps_what_a_real_pass_keeps(name, checkpointing):
    real = kept_for_backward(model_of(name), checkpointing=checkpointing)
    with FullRows(), as_on_a_device():
        assert kept_for_backward(model_of(name, "meta"), checkpointing=checkpointing) == real > 0


@pytest.fixture(autouse=True)
def one_thread():
    """A CPU's attention has room for each of its threads, which no plan counts; beside such small models it shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real_step(name: str, options: TrainingOptions, dtype, healing=None) -> tuple[int, Vocabulary]:
    """Bytes in use at most in a step of `train` in which every token is another row."""
    model = trunk_of(model_of(name, dtype=dtype), options)
    weight = model.get_input_embeddings().weight
    rows = BATCH * LENGTH * options.accumulation
    frozen_from = torch.full((rows,), -1)
    frozen_from[: rows // 4] = torch.arange(rows // 4)
    table = lambda: EmbeddingTable(weight, frozen_from, torch.randn(rows, weight.shape[1]))  # noqa: E731
    student = Student(table())
    if trains_output(options.objectives()):
        tied = model.get_output_embeddings().weight is weight
        output = model.get_output_embeddings().weight
        classes = (torch.arange(size) % 50 for size in (len(output), rows))
        head = Head(torch.randn(rows, weight.shape[1]).to(dtype))
        student = Student(student.input, None if tied else table(), head, Target(Head(output), *classes, 50))
    documents = 2 if options.packing else 1
    segments = np.arange(LENGTH // documents) * 2 // 3
    batches = [
        collate([[Chunk(x % 101, x, segments, segments) for x in np.split(row, documents)] for row in ids], Counter())
        for ids in np.arange(rows).reshape(options.accumulation, BATCH, LENGTH)
    ]
    if "segment-kl" in options.objectives():
        batches = [with_many_continuations(batch, 101, rows) for batch in batches]
    before = [*model.parameters(), *model.buffers()]
    before += [x for part in student.tables for x in (part.trainable,)] + (
        [student.head.weight] if student.head else []
    )
    for batch in batches[:1]:
        before += [batch.teacher_ids, batch.student_ids, batch.distinct_ids, *vars(batch.places).values()]
        before += [x for part in batch.continuations or () for x in vars(part).values()]
    accelerator = Accelerator(cpu=True)

    def run():
        if healing is None:
            return train(model, model, student, iter(batches), LAYERS, options, accelerator)
        layers = TrainedLayers(model, healing)
        state = TrainingState.begin(student, options, layers)
        return train(model, layers.student, state, iter(batches), LAYERS, options, accelerator)

    peak, _ = allocations(run)
    return sum(storages(before).values()) + int(peak), Vocabulary(rows, rows - rows // 4)


CASES = [(name, "token-distillation", {}) for name in CONFIGS] + [("llama", name, {}) for name in OBJECTIVES]
CASES += [("gemma3", "aim+ntp", {"checkpointing": True}), ("gpt_neox", "aim", {"checkpointing": True})]
CASES += [("qwen3", "ntp", {"accumulation": 3}), ("gpt_neox", "aim_star+boundary-head", {})]
PACKED = {"packing": True, "checkpointing": True}
CASES += [("qwen3", "ntp", {"packing": True}), ("gpt_neox", "token-distillation", PACKED)]
CASES += [("llama", "ntp", {"moments": "dense"})]


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "lora"), ("llama", "outer"), ("llama", "full"), ("mixtral", "lora")]
)
def test_the_peak_of_healing_is_that_of_a_real_step(name, method):
    healing = HealingOptions(method, steps=1, rank=8, outer_layers=1, objective="alm+boundary-kl")
    options = TrainingOptions(objective=healing.objective, backend="torch", steps=1)
    measured, vocabulary = real_step(name, options, torch.float32, healing)
    step = simulate(model_of(name, "meta"), vocabulary, LENGTH, BATCH, LAYERS, options, healing)
    assert measured * 0.9 < step.peak < measured * 1.1


def check_peak(name: str, objective: str, more: dict, dtype) -> None:
    options = TrainingOptions(objective=objective, backend="torch", steps=1, **more)
    measured, vocabulary = real_step(name, options, dtype)
    model = trunk_of(model_of(name, "meta", dtype), options)
    step = simulate(model, vocabulary, LENGTH, BATCH, LAYERS, options)
    assert step.parts["frozen weights"] == sum(storages([*model.parameters(), *model.buffers()]).values())
    assert measured * 0.93 < step.peak < measured * 1.07


@pytest.mark.parametrize(("name", "objective", "more"), CASES, ids=str)
def test_the_peak_is_that_of_a_real_step(name, objective, more):
    check_peak(name, objective, more, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_peak_in_bfloat16(name):
    check_peak(name, "token-distillation", {}, torch.bfloat16)


def test_work_is_counted_by_hand():
    """Token distillation behind one layer: twice forward, and backward for the inputs of products only."""
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).get_decoder()
    freeze(model)
    steps = [
        simulate(model, Vocabulary(11, 5), 6, 2, 1, TrainingOptions(accumulation=accumulation, backend="torch"))
        for accumulation in (1, 3)
    ]
    weights = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 12
    scores = 2 * 2 * 6 * 6 * 4  # rows, heads, queries, keys, head dimension
    # products with weights: 3 times; attention: 2 products forward, and 5 backward
    assert steps[0].flops == 2 * (3 * 12 * weights + (2 * 2 + 5) * scores)
    assert steps[1].flops == 3 * steps[0].flops


@pytest.mark.parametrize(
    ("name", "objective"), [("llama", "aim"), ("mistral", "aim_star"), ("gemma3", "aim-all-layers")]
)
def test_the_kernels_take_no_more_than_the_torch_engine(name, objective):
    model = trunk_of(model_of(name, "meta", torch.bfloat16), TrainingOptions())
    chosen = [TrainingOptions(objective=objective, backend=backend) for backend in ("triton", "torch")]
    peaks = [simulate(model, Vocabulary(90, 50), LENGTH, BATCH, LAYERS, options).peak for options in chosen]
    assert peaks[0] < peaks[1]


@pytest.fixture
def folders(tmp_path):
    save_tiny_model(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()  # a plan reads no weights
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "model"), str(tmp_path / "tokenizer")


def test_what_fits_fits_and_a_little_more_does_not(folders):
    settings = {"length": 64, "batch_size": 8, "precision": "no", "device": "cpu", "vram": 1 << 20}
    found = plan(*folders, **settings)
    assert (found.n_layers, found.rows) == (1, 330)
    assert found.step.peak > 1 << 20
    peak = lambda **changes: plan(*folders, **settings | {"vram": None} | changes).step.peak  # noqa: E731
    assert peak(length=found.longest) <= 1 << 20 < peak(length=found.longest + max(1, found.longest // 40))
    assert peak(batch_size=found.largest_batch) <= 1 << 20 < peak(batch_size=found.largest_batch + 1)
    remedies = {x.options: x for x in found.remedies}
    assert remedies["--checkpointing"].peak == peak(training=TrainingOptions(checkpointing=True))
    assert remedies["--precision bf16"].peak == peak(precision="bf16")
    assert remedies[f"--max-length {found.longest}"].fits
    smaller = next(x for x in found.remedies if x.options.startswith("--batch-size"))
    assert smaller.options.startswith(f"--batch-size {found.largest_batch} --accumulation ")
    assert all(x.fits == (x.peak <= 1 << 20) for x in found.remedies)


def test_healing_has_to_fit_too(folders):
    config = Path(folders[0], "config.json")
    config.write_text(config.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 32'))
    settings = {"length": 32, "precision": "no", "device": "cpu", "healing": HealingOptions("lora", objective="ntp")}
    whole = plan(*folders, **settings)
    vram = (whole.step.peak + whole.healing.peak) // 2
    assert whole.step.peak < vram < whole.healing.peak
    found = plan(*folders, **settings, vram=vram)
    assert 0 < found.largest_batch < 4
    remedies = {x.options: x for x in found.remedies}
    assert f"--batch-size {found.largest_batch} --accumulation {-(-4 // found.largest_batch)}" in remedies
    assert not any("--offload" in name for name in remedies)  # which does not go with healing
    packed = plan(*folders, **settings, training=TrainingOptions(quantization="4bit")).healing.peak
    assert remedies["--quantization 4bit"].peak == packed


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
        GPT2Config(n_embd=32, n_layer=4, n_head=4),
        JambaConfig(**GROUPED, num_experts=2, attn_layer_period=2, attn_layer_offset=1),
    ],
    ids=lambda x: x.model_type,
)
def test_models_that_look_at_values_or_multiply_by_experts(tmp_path, config, precision):
    save_tiny_model(tmp_path / "model", config)
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = {"length": 40, "batch_size": 2, "precision": precision, "training": TrainingOptions(steps=0)}
    planned = plan(tmp_path / "model", tmp_path / "tokenizer", **given, healing=HealingOptions(objective="segment-kl"))
    assert planned.healing.peak > planned.healing.parts["frozen weights"] > 0


def test_healing_alone(folders):
    """No step of rows is predicted, or has to fit, where a transfer makes none."""
    settings = {"length": 32, "precision": "no", "device": "cpu", "healing": HealingOptions("lora", objective="ntp")}
    rows = TrainingOptions(objective="segment-kl+boundary-kl")  # takes more than healing
    both = plan(*folders, **settings, training=rows)
    assert both.step.peak > both.healing.peak
    alone = plan(*folders, **settings, training=replace(rows, steps=0), vram=both.healing.peak)
    assert (alone.step, alone.healing, alone.remedies) == (None, both.healing, ())
    assert 4 <= alone.largest_batch < 6
    assert plan(*folders, **settings, training=rows, vram=both.healing.peak).remedies
    options = ["plan", f"--model={folders[0]}", f"--tokenizer={folders[1]}", "--device=cpu", "--length=32"]
    shown = run(*options, "--heal=lora", "--steps=0", "--teraflops=1")
    assert "Predicted peak of healing" in shown.stdout
    assert "teraflop a step of rows and layers together" in shown.stdout
    assert shown.stdout.count("GiB") == 1  # of the table, which a line on healing beside it would repeat
    refused = run(*options, "--steps=0")
    assert (refused.exit_code, refused.stderr) == (
        1,
        "Error: steps: wanted 1 or more without healing, got 0, which trains nothing\n",
    )


def test_no_more_positions_than_the_model_has(folders):
    found = plan(*folders, length=32, batch_size=1, device="cpu", vram=1 << 40)
    assert found.longest == 2048
    assert found.largest_batch == (1 << 19) / 32  # no larger one is looked for, however small the model


def test_all_remedies_together_where_none_is_enough(folders):
    settings = {"length": 512, "batch_size": 1, "n_layers": 3, "precision": "no", "device": "cpu"}
    single = plan(*folders, **settings, vram=plan(*folders, **settings).step.peak - 1).remedies
    names = ["--checkpointing", "--precision bf16", "--quantization 4bit", "--checkpointing --offload disk"]
    assert [x.options for x in single][:-1] == names
    vram = min(x.peak for x in single[:-1]) - 1
    found = plan(*folders, **settings, vram=vram).remedies
    assert [x.options for x in found][4:5] == ["--checkpointing --precision bf16"]
    assert found[4].fits == (found[4].peak <= vram)
    lowest = plan(*folders, **settings, vram=found[4].peak - 1).remedies
    assert "--checkpointing --precision bf16 --quantization 4bit" in [x.options for x in lowest]


def test_quantised_and_offloaded_weights(folders):
    """The bytes of the layers' weights by hand; embeddings and norms stay as they are."""
    settings = {"length": 64, "batch_size": 2, "n_layers": 2, "precision": "no", "device": "cpu"}
    parts = lambda **options: plan(*folders, **settings, training=TrainingOptions(**options)).step.parts  # noqa: E731
    linear = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)  # weights in two layers
    outputs = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    plain = parts()["frozen weights"]
    assert plain - parts(quantization="8bit")["frozen weights"] == 4 * linear - linear - 4 * outputs
    assert plain - parts(quantization="4bit")["frozen weights"] == 4 * linear - linear // 2 - linear // 64 * 4
    offloaded = parts(offload="disk", checkpointing=True)
    norms = 2 * 2 * 32
    assert plain - offloaded["frozen weights"] == pytest.approx(4 * (linear + norms), abs=4 * 2 * 9)  # 9 placeholders
    assert offloaded["student"] + offloaded["backward"] > 4 * linear // 2  # but one layer's are there at the peak


def test_an_encoder(tmp_path):
    config = ModernBertConfig(
        vocab_size=275,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        architectures=["ModernBertForMaskedLM"],
    )
    config.save_pretrained(tmp_path)
    new_tokenizer().save_pretrained(tmp_path)
    assert plan(tmp_path, tmp_path, length=64, batch_size=2, device="cpu", n_layers=2).step.parts["student"] > 0
    with pytest.raises(ValueError, match="objective: ntp and boundary-head want a causal language model"):
        plan(tmp_path, tmp_path, device="cpu", training=TrainingOptions(objective="ntp"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length: wanted at least 1, got 0"),
        ({"length": 2049}, "length: wanted at most the model's 2048 positions, got 2049"),
        ({"length": 10**12}, "length: wanted at most 16,777,216, got"),
        ({"batch_size": 10**12}, "batch_size: wanted at most 65,536, got"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
        ({"n_layers": 4}, "n_layers: wanted 1 to 3 for this model, got 4"),
        ({"bandwidth": 0}, "bandwidth: wanted a number above 0, got 0"),
        ({"vram": -1}, "vram: wanted a number above 0, got -1"),
        ({"precision": "fp16"}, "precision: wanted one of no, bf16, got 'fp16'"),
        ({"device": "tpu"}, "device: wanted one of cuda, cpu, got 'tpu'"),
        (
            {"vram": 1000},
            "vram: wanted at least 0.00 GiB, which a single token takes.*; with --quantization 4bit it takes",
        ),
    ],
    ids=str,
)
def test_clear_errors(folders, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(*folders, **{"device": "cpu"} | changes)


def test_unknown_model(folders):
    with pytest.raises(ValueError, match="could not be loaded as a model"):
        plan("no/such-model-here", folders[1])


@pytest.mark.parametrize("most", [0, 1, 2, 63, 64, 65, 100])
def test_largest(most):
    for limit in (1, 2, 64, 70):
        found = _largest(lambda n: n, most, limit, 64)
        exact = min(most, limit)
        assert exact - max(0, exact // 64) <= found <= exact


def test_command(folders):
    model, tokenizer = folders
    arguments = ["--model", model, "--tokenizer", tokenizer, "--device", "cpu", "--teraflops", "2"]
    result = run("plan", *arguments, "--vram", (1 << 19) / GIB)
    assert result.exit_code == 0, result.output
    for word in ("frozen weights", "modelled time", "longest", "largest batch", "--checkpointing"):
        assert word in result.output
    result = run("plan", *arguments[:-1], "0")
    assert result.exit_code == 1
    assert "teraflops: wanted a number above 0" in result.output
