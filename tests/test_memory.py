"""Peak memory of a device."""

import pytest
import torch

from matt_fast.support.memory import peak_memory, reset_peak_memory


def test_the_peak_begins_anew():
    device = torch.device("cpu")
    block = torch.zeros(2**26)
    del block
    before = peak_memory(device)
    reset_peak_memory(device)
    assert 0 < peak_memory(device) <= before


@pytest.mark.parametrize("initialised", [False, True])
def test_nothing_is_reset_before_cuda_is_initialised(initialised, monkeypatch):
    """torch refuses to then; a run with frozen weights in float32 and no held-out data gets there first."""
    reset = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    reset_peak_memory(torch.device("cuda"))
    assert len(reset) == initialised
