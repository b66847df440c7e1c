"""What frozen weights are in, where nobody says: what the device multiplies in."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_runs import Stop, files, stop_at  # noqa: F401, a fixture
from tiny import TEXTS, jsonl, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from matt_fast import TrainingOptions, transfer
from matt_fast.model import precision
from matt_fast.model.precision import choose_dtype
from matt_fast.tokenizers import extend

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("instructions", "most", "expected"),
    [(True, None, True), (True, "DEFAULT", True), (True, "avx512_core_vnni", False), (False, None, False)],
)
def test_a_cpu_with_instructions_for_it(monkeypatch, instructions, most, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    for name in precision.ISA:
        monkeypatch.delenv(name, raising=False)
    if most is not None:
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", most)
    chosen = [
        choose_dtype(SimpleNamespace(mixed_precision=mixed, device=CPU), given)
        for mixed, given in (("no", "auto"), ("no", "no"), ("bf16", "auto"), ("bf16", "bf16"))
    ]
    half, single = torch.bfloat16, torch.float32
    assert chosen == [half if expected else single, single, half, half]
    assert not precision.multiplies_in_bfloat16(torch.device("meta"))


def test_a_run_goes_on_in_what_it_began_with(files, tmp_path, monkeypatch):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name}
    given |= {"training": TrainingOptions(steps=4), "checkpoint_every": 2, "epochs": None}

    def on(instructions: bool, name: str, **more):
        messages = []
        monkeypatch.setattr("matt_fast.model.precision.multiplies_in_bfloat16", lambda device: instructions)
        transfer(**given, output=tmp_path / name, on_message=messages.append, **more)
        return messages

    assert any(x.startswith("precision: frozen weights are bfloat16") for x in on(True, "whole"))
    assert not any(x.startswith("precision") for x in on(False, "single"))
    with pytest.raises(Stop):
        on(True, "parts", on_step=stop_at(3))
    with pytest.raises(ValueError, match="precision: was 'bf16', now 'no'"):
        on(True, "parts", resume=True, precision="no")
    on(False, "parts", resume=True)
    half, parts, single = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("whole", "parts", "single"))
    assert half == parts != single


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_rows_that_stay_keep_the_digits_that_they_are_stored_with(tied, steps, tmp_path):
    """Shared rows of both tables, trained or not, and a result's own where it trains on without them."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_tiny_model(tmp_path / "base", LlamaConfig(**sizes, tie_word_embeddings=tied))
    (tmp_path / "data.jsonl").write_text(jsonl(TEXTS))
    extend(tmp_path / "base", tmp_path / "new", data=tmp_path / "data.jsonl", add=9)
    given = {"data": tmp_path / "data.jsonl", "precision": "bf16"}
    first, second = (TrainingOptions(steps=steps, objective=x) for x in ("token-distillation", "ntp"))
    transfer(tmp_path / "base", tmp_path / "new", output=tmp_path / "made", training=first, **given)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert same_rows(tmp_path / "base", made, range(270))
    for module in {made.get_input_embeddings(), made.get_output_embeddings()}:
        module.weight.data.add_(torch.randn_like(module.weight), alpha=1e-3)  # with more digits than bfloat16 has
    made.save_pretrained(tmp_path / "made")
    more = {"tokenizer": tmp_path / "made", "teacher": tmp_path / "base", "output": tmp_path / "more"}
    transfer(tmp_path / "made", training=second, **more, **given)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert same_rows(tmp_path / "made", made, unseen(tmp_path / "more"))


def same_rows(before, made, ids) -> bool:
    """Whether a model has the rows of one in a folder, in both tables."""
    pair = AutoModelForCausalLM.from_pretrained(before), made
    tables = [(x.get_input_embeddings(), x.get_output_embeddings()) for x in pair]
    return all(torch.equal(old.weight[list(ids)], new.weight[list(ids)]) for old, new in zip(*tables, strict=True))


def unseen(folder) -> list[int]:
    """Ids of a result whose rows training did not reach, nor moved."""
    lines = [json.loads(line) for line in (folder / "token_provenance.jsonl").open()]
    assert all(x.get("moved", 0.0) == 0.0 for x in lines if not x["seen"])
    return [x["id"] for x in lines if not (x["trained"] and x["seen"])]


SHAPES = """
import sys
import psutil, torch
from matt_fast.model.teacher import Teacher

model = Teacher(sys.argv[1]).load(torch.bfloat16)
torch.set_num_threads(1)
x, weight = torch.ones(300, 576, dtype=torch.bfloat16), torch.ones(576, 1536, dtype=torch.bfloat16)
begun, process = None, psutil.Process()
for count in range(100, 300):
    x[:count] @ weight
    if count == 100 + int(sys.argv[2]):
        begun = process.memory_info().rss
print(process.memory_info().rss - begun)
"""


def test_text_of_any_shape_takes_no_memory_that_stays(tmp_path):
    """What oneDNN keeps of a shape is forgotten; as it comes, the process grows with each."""
    save_tiny_model(tmp_path)
    environment = {x: y for x, y in os.environ.items() if x not in (*precision.ISA, *sum(precision.CAPACITIES, ()))}
    grown = []
    for given in ({"LRU_CACHE_CAPACITY": "1024", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, {}):
        command = [sys.executable, "-c", SHAPES, str(tmp_path), str(precision.PRODUCTS)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | given)
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout) / 2**20)
    theirs, ours = grown
    assert ours < max(20, theirs / 2), grown  # MiB; theirs is small where oneDNN does not multiply
