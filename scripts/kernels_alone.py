"""What `make release-check` runs where the wheel is installed beside torch, Triton and NumPy, and nothing else."""

import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec

os.environ["TRITON_INTERPRET"] = "1"

import matt_kernels
import torch


def main() -> None:
    assert not find_spec("transformers")
    torch.manual_seed(0)
    teacher, student = ([torch.randn(1, 2, n, 16) for _ in "qkv"] for n in (7, 5))
    segments = torch.tensor([[0, 0, 1, 2, 2, 2, 3]]), torch.tensor([[0, 1, 1, 2, 3]])
    student = [x.requires_grad_() for x in student]
    loss = matt_kernels.aim_loss(teacher, student, *segments)
    loss.backward()
    assert loss > 0
    assert all(x.grad.isfinite().all() and x.grad.any() for x in student)
    same = matt_kernels.aim_loss(teacher, teacher, segments[0], segments[0])
    assert same < 1e-12 * loss, "a model beside itself"  # sums in two orders
    told = {name: version(name) for name in ("torch", "triton", "numpy")}
    print(json.dumps({"python": platform.python_version(), **told}))


if __name__ == "__main__":
    main()
