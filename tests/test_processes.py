"""Several processes: the same rows as one with as many batches per update, with whole layers and with layers that are
spread over them; what is sent, and what is refused."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from two_processes import BATCH, CASES, LAYERS, LENGTH, VOCABULARIES, trained

from matt_fast import HealingOptions, TrainingOptions, plan, transfer
from matt_fast.model.teacher import Teacher
from matt_fast.planning.plan import plan_step
from matt_fast.planning.simulation import Vocabulary
from matt_fast.recipe.processes import Processes
from matt_fast.training import loop
from matt_fast.training.sharding import check_sharding

TINY = {"length": LENGTH, "batch_size": BATCH, "n_layers": LAYERS, "precision": "no", "device": "cpu"}
EMPTY = 5  # documents


def run_two(script: str, *arguments: str) -> None:
    folder = Path(__file__).parent
    command = [sys.executable, str(folder / "pair.py"), str(folder / script), *arguments]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sharded")
    save_tiny_model(place / "teacher")
    new_tokenizer().save_pretrained(place / "new")
    (place / "corpus.jsonl").write_text(jsonl([*TEXTS, *[" "] * EMPTY]))
    (place / "held.txt").write_text("def function_omega(self, value=77):\n    return self.omega - value\n")
    return place


@pytest.fixture(scope="module")
def done(folder):
    """What both processes found."""
    run_two("two_processes.py", str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_accumulation(done, case):
    found = [torch.load(done / f"found-{i}.pt")[case] for i in range(2)]
    expected = trained(done, case, 0, 1, shard=False)
    assert found[0].keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], x, rtol=1e-4, atol=1e-5)


def test_only_rows_of_the_step_are_sent(done):
    """Of two processes with as many other ids each: a mean of rows over a ring, and the ids."""
    sent = json.loads((done / "sent.json").read_text())
    rows = 2 * BATCH * LENGTH
    for size in VOCABULARIES:
        assert rows * 32 * 4 <= sent[str(size)] < rows * 32 * 4 * 1.1  # whatever the vocabulary
        assert sent[str(size)] < 0.01 * size * 32 * 4


def test_the_plan_knows_what_is_sent(done):
    sent = json.loads((done / "sent.json").read_text())
    source, options = Teacher(done / "teacher"), TrainingOptions(objective="token-distillation")
    whole, spread = plan_step(source, Vocabulary(1000, 1000), options, **TINY, processes=2, bandwidth=2.0).layouts
    weights = sum(x.nbytes for x in source.load(torch.float32, LAYERS).get_decoder().layers.parameters())
    assert spread.layers == 3 * weights / 2  # a half comes from the other process, for teacher, student and backward
    assert whole.layers == 0
    assert sent["sharded"] == pytest.approx(spread.sent, rel=0.02)
    assert spread.seconds == pytest.approx(spread.sent / 2e9)
    kept = whole.step.parts["frozen weights"] - spread.step.parts["frozen weights"]
    assert kept == pytest.approx(weights / 2 - 3 * weights / LAYERS, abs=100)  # gloo gathers into a third layer


def test_a_stopped_transfer_goes_on_to_the_same_bits(done):
    """From one stage into the next, and of the last one with whole layers where rounding may differ."""
    one, other, changed = (done / name / "model.safetensors" for name in ("at-once", "stopped", "changed"))
    assert one.read_bytes() == other.read_bytes()
    known = load_file(one)
    for name, x in load_file(changed).items():
        torch.testing.assert_close(x, known[name], rtol=1e-4, atol=1e-5)


def test_what_was_skipped_is_that_of_all_processes(done):
    for name in ("at-once", "stopped", "changed"):
        progress = json.loads((done / name / "run" / "result.json").read_text())["progress"]
        assert progress["skipped"] == {"documents without text": EMPTY}


def test_weights_that_only_get_worse_are_not_the_result(done):
    """In either stage, of a run that was stopped and went on."""
    found = json.loads((done / "spoiled" / "run" / "result.json").read_text())
    figures = [next(iter(found["evaluations"][x].values()))["bits_per_byte"] for x in ("initialised", "trained")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    for stage in (found, found["healing"]):
        assert stage["best_step"] == 0
        assert min(bits for _, bits in stage["validation"]) > figures[0]


def test_the_layout_that_sends_least_of_those_that_fit(folder):
    given = {**TINY, "processes": 4, "length": 16}
    found = plan(folder / "teacher", folder / "new", **given)
    whole, spread = found.layouts
    assert found.layout(whole.step.peak) is whole
    assert found.layout(0) is None
    assert found.step == whole.step
    assert plan(folder / "teacher", folder / "new", **given, training=TrainingOptions(shard=True)).step == spread.step
    assert not plan(folder / "teacher", folder / "new", **TINY).layouts


@pytest.mark.parametrize(
    "other", [{"quantization": "4bit"}, {"compile": True}, {"offload": "disk", "checkpointing": 1}]
)
def test_what_does_not_go_with_it(other):
    with pytest.raises(ValueError, match=f"shard and {next(iter(other))}: wanted one of them, got both: "):
        TrainingOptions(shard=True, **{name: x if name != "checkpointing" else True for name, x in other.items()})


def test_a_transfer_says_what_it_wants(folder, tmp_path, monkeypatch):
    def refused(**given):
        models = folder / "teacher", folder / "new", folder / "corpus.jsonl", tmp_path / "output"
        return transfer(*models, training=TrainingOptions(shard=True, steps=1), device="cpu", **given)

    with pytest.raises(ValueError, match="shard: wanted several processes to spread the layers over, got one"):
        refused()
    with pytest.raises(ValueError, match="heal: wanted 'lora' with layers that are spread over processes, whose"):
        refused(healing=HealingOptions("full"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shard: wanted accelerate without FSDP settings of its own"):
        check_sharding(False, 2)
    with pytest.raises(ValueError, match="shard: wanted processes of 2 or more with it, got 1"):
        plan(folder / "teacher", folder / "new", training=TrainingOptions(shard=True))


def test_kernels_inside_distributed_data_parallel():
    """Gradients are the mean of those of both processes' batches."""
    run_two("two_processes_kernels.py")


def test_what_all_have_read_does_not_stay_in_memory():
    """The curve of all validations so far is told behind each of them."""
    store, curve = dist.HashStore(), []

    def work(index: int) -> list:
        processes = Processes.__new__(Processes)
        given = {"count": 2, "index": index, "_store": store, "_waits": 0, "_values": 0, "_inside": False}
        vars(processes).update(given, _next_look=math.inf)
        found = []
        for number in range(40):
            curve.extend([number] if index == 0 else [])
            found.append(processes.of_main(curve if index == 0 else None))
            processes.wait()
        return found

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(work, range(2))
    assert first == second == [list(range(number + 1)) for number in range(40)]
    assert store.num_keys() <= 4


def test_processes_meet_once_for_many_small_tensors(monkeypatch):
    monkeypatch.setattr(loop, "EXCHANGED", 40)
    sizes = (3, 4), (2,), (), (50,), (5, 7), (1, 6)
    tensors = [torch.randn(size, dtype=torch.bfloat16 if size == (2,) else torch.float32) for size in sizes]
    met = []

    class Processes:
        num_processes = 3

        def reduce(self, tensor, reduction):
            met.append(tensor.numel())
            return tensor * 3

    found = loop.averaged(tensors, Processes())
    assert met == [12, 2, 1, 50, 35, 6]
    for before, after in zip(tensors, found, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before * 3)
    met.clear()
    loop.averaged([torch.ones(5, 2) for _ in range(11)], Processes())
    assert met == [40, 40, 30]
