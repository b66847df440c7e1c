"""Opt-in tuning: tile shapes measured on the device at hand, for a kind of input and not for a length."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from matt_kernels import ops
from matt_kernels.configs import Config, Launch
from matt_kernels.loss import Tensors, aim_loss, tile_widths

KERNELS = {
    "aim": ("softmax", "factors", "rows", "columns"),
    "aim_star": ("attend", "attend_rows", "attend_columns"),
}
BLOCKS_M, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (1, 2, 3)


def autotune(
    teacher: Tensors,
    student: Tensors,
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
    *,
    variant: str = "aim",
    metric: str = "mse",
    measure: Callable[[Callable[[], None]], float] = do_bench,
    **options,
) -> Config:
    """Measures forward and backward of aim_loss on these inputs with other blocks, warps and stages, one kernel after
    the other, and lets this process use the fastest from then on.

    Arguments as in aim_loss; take a batch of the size you train on. What is found holds for all inputs of the same head
    dimensions, dtype, metric and device model, with or without soft-capping, whatever their lengths, as long as the
    teacher's side has (or has not) half as many tokens again as the student's. Shapes that do not compile for lack of
    registers or shared memory are passed over. `measure` gives the milliseconds of a call.

    Returns:
        The config, also for the printing: its fields are those of matt_kernels.configs.
    """
    student = tuple(x.detach().requires_grad_() for x in student)
    kind = student[0], student[2], variant, metric
    widths = tile_widths(*kind)(teacher[0].shape[2], student[0].shape[2])
    flags = {"lopsided": widths[0] > widths[1], "softcap": options.get("softcap") is not None}
    key, best = ops.problem_of(*kind, **flags), ops.config_for(*kind, **flags)

    def step() -> None:
        segments = teacher_segments, student_segments
        loss = aim_loss(teacher, student, *segments, variant=variant, metric=metric, **options)
        torch.autograd.grad(loss, student)

    def time_of(config: Config) -> float:
        ops.TUNED[key] = config
        try:
            return measure(step)
        except OutOfResources:
            return float("inf")

    try:
        shortest = time_of(best)
        for kernel in KERNELS[variant]:
            start: Launch = getattr(best, kernel)
            for block_m, warps, stages in product(BLOCKS_M, WARPS, STAGES):
                launch = replace(start, block_m=block_m, warps=warps, stages=stages)
                if launch == start or (kernel == "factors" and block_m != start.block_m):
                    continue
                config = replace(best, **{kernel: launch})
                if (found := time_of(config)) < shortest:
                    shortest, best = found, config
    finally:
        ops.TUNED[key] = best
    return best
