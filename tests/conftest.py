"""What tests share: the kernels in Triton's interpreter where there is no GPU, and jobs that are ready to be done."""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import quick
import torch

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")  # CPUs that multiply in bfloat16 are as others
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # names that nothing has are not looked up for half a minute
quick.commands()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    if find_spec("triton"):
        quick.interpreter()


@pytest.fixture(params=["llama"])
def setting(tmp_path, request, monkeypatch):
    """(MATT with prepared data, class, folder) in a folder of its own."""
    from tiny_matt import prepared

    monkeypatch.chdir(tmp_path)
    return prepared(request.param)


@pytest.fixture
def device():
    """Where the kernels run: a GPU if there is one, and tensors of the test are made there; else the CPU, in Triton's
    interpreter."""
    if not torch.cuda.is_available():
        yield torch.device("cpu")
        return
    with torch.device("cuda") as found:
        yield found


@pytest.fixture
def poisoned(monkeypatch):
    """Every element of an uninitialised buffer must be written before it is read."""
    from test_loss import _poison

    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: _poison(_original(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and blocks of 16 in the kernels, so that small inputs take every path."""
    from matt_kernels import configs

    chosen = configs.choose_config

    def small(*arguments):
        config = chosen(*arguments)
        launches = {x: y for x, y in vars(config).items() if isinstance(y, configs.Launch)}
        launches = {x: replace(y, block_m=16, block_n=16) for x, y in launches.items()}
        return replace(config, widths=(16, 16), block_v=16, **launches)

    monkeypatch.setattr(configs, "choose_config", small)


@pytest.fixture
def job(tmp_path):
    """(arguments of a small transfer, the tokenizer of its model)."""
    from small_jobs import small_job

    return small_job(tmp_path)


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Arguments of the calls of `transfer`, which does nothing; with those that it will have."""
    from commands import without_work

    monkeypatch.chdir(tmp_path)
    return without_work(monkeypatch)
