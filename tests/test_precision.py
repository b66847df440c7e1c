"""What frozen weights are in, where nobody says: what the device multiplies in."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_runs import Stop, files, stop_at  # noqa: F401, a fixture
from tiny import save_tiny_model

from matt_fast import TrainingOptions, transfer
from matt_fast.model import precision
from matt_fast.model.precision import choose_dtype

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
