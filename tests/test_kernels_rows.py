"""The fused update of embedding rows against torch.optim.AdamW in float64 and the torch path, in the interpreter."""

import math
import os
import subprocess
import sys

import matt_kernels
import numpy as np
import pytest
import sanitizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matt_kernels import configs, ops
from safetensors.torch import load_file
from tiny import TEXTS, new_tokenizer, save_tiny_model

from matt_fast import TrainingOptions, transfer
from matt_fast.model.embeddings import RowAdamW

pytestmark = pytest.mark.usefixtures("device")

ROWS = 7


def drawn(*shape, seed=0) -> torch.Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return found.to(torch.get_default_device())


def steps_of(hidden: int, count: int = 6):
    """(slots, gradient, lr) of steps in which row 1 is always there, row 6 never, and the others now and then."""
    for step in range(count):
        slots = torch.tensor([x for x in (4, 1, 0, 5, 2, 3) if x == 1 or (x + step) % 3])
        yield slots, drawn(len(slots), hidden, seed=step), 0.03 / (1 + step)


@pytest.mark.parametrize("hidden", [1, 5, 100, 255, 256, 576, 1024, 1030])
def test_every_row_is_adamws_of_its_own_steps(hidden):
    """Each row is a parameter of its own to float64 AdamW, stepped only when it occurs."""
    table = drawn(ROWS, hidden, seed=99)
    parameters = [row.double().requires_grad_() for row in table]
    adamw = [torch.optim.AdamW([x], weight_decay=0.0) for x in parameters]
    sides = {name: RowAdamW(table.clone(), 0.0, backend=name) for name in ("triton", "torch")}
    assert [x.fused for x in sides.values()] == [True, False]
    for slots, gradient, lr in steps_of(hidden):
        for side in sides.values():
            side.lr = lr
            side.step(slots, gradient)
        for slot, row in zip(slots.tolist(), gradient, strict=True):
            adamw[slot].param_groups[0]["lr"] = lr
            parameters[slot].grad = row.double()
            adamw[slot].step()
    exact = torch.stack(list(parameters)).detach()
    for side in sides.values():
        moved = (exact - table).norm()
        assert (side.table.double() - exact).norm() <= 2e-6 * moved
    fused, plain = sides.values()
    for name in ("table", "first_moment", "second_moment"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-6, atol=1e-7)
    assert torch.equal(fused.updates, plain.updates)
    assert torch.equal(fused.table[6], table[6])
    assert not fused.first_moment[6].any()


def test_a_thousand_steps_stay_together():
    sides = [RowAdamW(torch.zeros(2, 3), 0.01, backend=name) for name in ("triton", "torch")]
    for step in range(1000):
        for side in sides:
            side.step(torch.tensor([1]), drawn(1, 3, seed=step))
    torch.testing.assert_close(sides[0].table, sides[1].table, rtol=1e-5, atol=1e-6)


def test_first_steps_are_exact_for_any_beta():
    """1 - beta ** n loses its digits in float32 where it is small: the first steps of a long memory."""
    for beta in (0.9, 0.999, 0.999999):
        for count in (1, 2, 3, 100, 499, 501, 700, 5000, 10**6):
            side = RowAdamW(torch.zeros(1, 1), 1.0, betas=(beta, beta), eps=0.0, backend="triton")
            side.updates[0] = count - 1
            # moments such that only the corrections are left: the row becomes -(1 - beta ** n) ** -0.5
            side.first_moment[0], side.second_moment[0] = 1.0, 1.0
            side.step(torch.tensor([0]), torch.ones(1, 1))
            wanted = (-math.expm1(count * math.log(beta))) ** -0.5
            assert float(side.table) == pytest.approx(-wanted, rel=1e-6), (beta, count)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.data())
def test_any_rows(hidden, data):
    rows = data.draw(st.integers(1, 9))
    sides = [RowAdamW(drawn(rows, hidden), 0.05, backend=name) for name in ("triton", "torch")]
    for step in range(data.draw(st.integers(1, 4))):
        slots = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows)), dtype=int)
        for side in sides:
            side.step(slots, drawn(len(slots), hidden, seed=step))
    torch.testing.assert_close(sides[0].table, sides[1].table, rtol=1e-5, atol=1e-6)


def test_no_row_is_no_launch():
    side = RowAdamW(drawn(3, 4), 0.1, backend="triton")
    before = side.table.clone()
    side.step(torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    assert torch.equal(side.table, before)


def test_a_gradient_of_any_strides():
    side, other = (RowAdamW(drawn(3, 4), 0.1, backend="triton") for _ in range(2))
    slots, gradient = torch.tensor([2, 9, 0, 9])[::2], drawn(4, 2).T
    side.step(slots, gradient)
    other.step(slots.contiguous(), gradient.contiguous())
    assert torch.equal(side.table, other.table)


@pytest.mark.parametrize("hidden", [1, 100, 576, 1030])
def test_no_access_out_of_bounds_and_every_element_has_one_program(hidden, monkeypatch):
    sanitizer.install(monkeypatch)
    side = RowAdamW(drawn(5, hidden), 0.1, backend="triton")
    side.step(torch.tensor([4, 0, 2]), drawn(3, hidden))


def test_offsets_beyond_32_bits(tmp_path):
    """Tables of more than 2³¹ elements, as sparse files of which only the pages of the rows exist."""
    hidden = 1024
    rows = 2**31 // hidden + 3
    tables = []
    for name in ("table", "first", "second"):
        numbers = np.memmap(tmp_path / name, np.float32, mode="w+", shape=(rows, hidden))
        tables.append(torch.from_numpy(numbers))
    updates = torch.zeros(rows, dtype=torch.int64)
    slots, gradient = torch.tensor([rows - 1, 1]), drawn(2, hidden)
    matt_kernels.adamw_rows(*tables, updates, slots, gradient, lr=0.1)
    table, first, _ = tables
    torch.testing.assert_close(table[slots], -0.1 * gradient.sign(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[slots], 0.1 * gradient)
    assert not table[[0, 2, rows - 2]].any()
    assert updates.nonzero().flatten().tolist() == [1, rows - 1]


def test_opcheck():
    tensors = drawn(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    torch.library.opcheck(ops.update_rows, (*tensors, torch.tensor([2, 0]), drawn(2, 4), 0.1, 0.9, 0.999, 1e-8))


def test_the_meta_device_needs_no_kernel():
    side = RowAdamW(torch.empty(3, 4, device="meta"), 0.1, backend="triton")
    side.step(torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(2, 4, device="meta"))


def test_every_thread_has_an_element():
    """In place, a row shorter than a block's threads would be read by some when others have written it."""
    for hidden in (1, 64, 576, 4096):
        chosen = configs.row_launch(hidden)
        assert chosen.block_n >= 64 * chosen.warps


def test_training_updates_rows_with_the_kernel_where_asked(tmp_path, monkeypatch):
    """A whole transfer by a loss that has no kernel: the update is all that differs."""
    save_tiny_model(tmp_path / "teacher")
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.txt").write_text("\n\n".join(TEXTS))
    calls, plain = [], matt_kernels.adamw_rows
    monkeypatch.setattr(matt_kernels, "adamw_rows", lambda *a, **k: calls.append(len(a[4])) or plain(*a, **k))
    paths = [tmp_path / name for name in ("teacher", "tokenizer", "corpus.txt")]
    found = {}
    for backend in ("torch", "triton"):
        training = TrainingOptions(steps=5, lr=1e-2, backend=backend)
        done = transfer(*paths, tmp_path / backend, max_length=48, batch_size=2, training=training, precision="no")
        weight = load_file(tmp_path / backend / "model.safetensors")["model.embed_tokens.weight"]
        found[backend] = done.progress.losses, weight, len(calls)
    assert (found["torch"][2], found["triton"][2]) == (0, 5)
    assert min(calls) > 0
    assert found["triton"][0] == pytest.approx(found["torch"][0], rel=1e-5)
    torch.testing.assert_close(found["triton"][1], found["torch"][1], rtol=1e-4, atol=1e-6)


def bad_calls():
    good = {
        "table": drawn(3, 4),
        "first_moment": torch.zeros(3, 4),
        "second_moment": torch.zeros(3, 4),
        "updates": torch.zeros(3, 1, dtype=torch.int64),
        "slots": torch.tensor([2, 0]),
        "gradient": drawn(2, 4),
        "lr": 0.1,
    }
    return [
        (good | {"table": drawn(12)}, ValueError, r"table must have shape \[rows, hidden\]; got \(12,\)"),
        (good | {"table": drawn(3, 4).bfloat16()}, TypeError, "table must be a torch.float32 tensor; got torch.bfloat"),
        (
            good | {"first_moment": torch.zeros(3, 5)},
            ValueError,
            r"first_moment must have shape \(3, 4\); got \(3, 5\)",
        ),
        (good | {"second_moment": torch.zeros(4, 3).T}, ValueError, "second_moment must be contiguous; got strides"),
        (good | {"updates": torch.zeros(3)}, TypeError, "updates must be a torch.int64 tensor; got torch.float32"),
        (good | {"slots": torch.tensor([2])}, ValueError, r"gradient must have shape \(1, 4\); got \(2, 4\)"),
        (good | {"gradient": drawn(2, 4).to("meta")}, ValueError, "gradient must be on the device of table, cpu; got"),
        (good | {"betas": (0.9, 1.0)}, ValueError, r"betas must lie between 0 and 1; got \(0.9, 1.0\)"),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda x: x[2][:20])
def test_errors(case):
    arguments, kind, message = case
    with pytest.raises(kind, match=message):
        matt_kernels.adamw_rows(**arguments)


def test_cpu_without_the_interpreter():
    program = """
import torch
from matt_fast.model.embeddings import RowAdamW
side = RowAdamW(torch.zeros(3, 4), 0.1)
assert not side.fused
side.step(torch.tensor([1]), torch.ones(1, 4))
RowAdamW(torch.zeros(3, 4), 0.1, backend="triton").step(torch.tensor([1]), torch.ones(1, 4))
"""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "the Triton kernels need tensors on a GPU" in done.stderr
