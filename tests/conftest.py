"""What tests share: the kernels in Triton's interpreter where there is no GPU, and a MATT that is ready to train."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported


@pytest.fixture(params=["llama"])
def setting(tmp_path, request, monkeypatch):
    """(MATT with prepared data, class, folder) in a folder of its own."""
    from tiny_matt import prepared

    monkeypatch.chdir(tmp_path)
    return prepared(request.param)
