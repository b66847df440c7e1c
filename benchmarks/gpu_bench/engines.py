"""The engines by name: the loss of each, its gradients, and whether the eager formula fits into memory."""

import math

import matt_kernels
import torch
from gpu_bench.inputs import Shape, pair_count, segments_of

from matt_fast.loss import aim_loss


def loss_of(engine: str, shape: Shape, inputs, prepared=None):
    teacher, student, *segments = inputs
    options = {"variant": shape.variant, "metric": shape.metric}
    if engine.startswith("triton"):
        ids = [x.to(student[0].device) for x in segments] if prepared is None else prepared[0]
        return matt_kernels.aim_loss(teacher, student, *ids, **options, plan=None if prepared is None else prepared[1])
    return aim_loss(teacher, student, *segments, backend=engine, **options)


def results(engine: str, shape: Shape, inputs, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Value and gradients, these times a power of two that keeps them in float16's range, as a gradient scaler does."""
    teacher, student, *segments = inputs
    teacher = tuple(x.to(dtype or x.dtype) for x in teacher)
    student = tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in student)
    loss = loss_of(engine, shape, (teacher, student, *segments))
    multiplier = 2.0 ** round(math.log2(pair_count(shape, segments[1])))
    return [loss.detach(), *torch.autograd.grad(loss * multiplier, student)]


def eager_fits(shape: Shape, size: int, device: str, heads: int) -> bool:
    """About six tensors of heads x segments x tokens x head_dim (or, for aim_star, of heads x tokens x tokens)."""
    teacher, student = segments_of(shape, None)
    count, length = int(student.max()) + 1, teacher.shape[1]
    numbers = heads * (length * length if shape.variant == "aim_star" else count * length * shape.head_dim)
    memory = 2**33 if device == "cpu" else torch.cuda.mem_get_info()[0]
    return 6 * numbers * size < 0.8 * memory
