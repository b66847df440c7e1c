"""Run by test_processes.py in two processes: the Triton engine inside DistributedDataParallel and autocast."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # gloo is on the CPU, whatever else there is

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from matt_fast.loss import aim_loss


class Projections(nn.Module):
    """q, k and v of both sides from states [B, n, 32]; 2 query heads and 1 key head of 16."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(32, 64, bias=False)

    def forward(self, teacher, student, *segments):
        return aim_loss(self.sides(teacher), self.sides(student), *segments, backend="triton")

    def sides(self, states):
        with torch.autocast("cpu", torch.bfloat16):
            heads = self.projection(states).unflatten(2, (4, 16)).transpose(1, 2)
        return heads[:, :2], heads[:, 2:3], heads[:, 3:]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    segments = torch.tensor([[0, 0, 1, 2, 2, 3]]), torch.tensor([[0, 1, 1, 2, 3]])
    return *(torch.randn(1, x.shape[1], 32, generator=generator) for x in segments), *segments


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Projections()
    alone = []
    for seed in range(2):
        (gradient,) = torch.autograd.grad(model(*batch(seed)), list(model.parameters()))
        alone.append(gradient)
    parallel = DistributedDataParallel(model)
    parallel(*batch(dist.get_rank())).backward()
    torch.testing.assert_close(model.projection.weight.grad, (alone[0] + alone[1]) / 2)
    assert model.projection.weight.grad.abs().sum() > 0
    dist.destroy_process_group()
