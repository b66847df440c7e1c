"""The grouped kernels beside those that ship, for decide.py: steps of both, and launches to try."""

import time
from dataclasses import replace
from unittest import mock

import matt_kernels
import torch
import triton
from gpu_bench.grouped.layout import grouped_plan
from gpu_bench.grouped.loss import Launch, Launches, launches_for, value_and_gradients
from gpu_bench.inputs import Shape, segments_of
from gpu_bench.steps import plan_of
from matt_kernels import configs
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# block_m, block_n, warps, stages; the defaults are among the first two.
ROWS = [(64, (64, 32), 4, 3), (64, (64, 32), 4, 2), (64, (64, 64), 4, 2), (128, (64, 32), 8, 2)]
COLUMNS = [(64, (64, 32), 4, 3), (64, (64, 32), 4, 2), (64, (64, 64), 4, 2), (64, (32, 32), 4, 2)]
SHARES = 1, 2, 4


def candidates() -> list[tuple[str, Launch]]:
    """(kernel, launch) of all that is tried."""
    return [(kernel, Launch(*x)) for kernel, shapes in (("rows", ROWS), ("columns", COLUMNS)) for x in shapes]


def compile_candidate(
    head_dim: int, length: int, heads: int, kv_heads: int, kernel: str, launch: Launch | None, metric: str = "mse"
) -> None:
    """Into Triton's cache, for sm_90; runs in a process of its own, without a GPU. No launch: the default."""
    import kernel_report

    launches, ids = [], segments_of(Shape(length, head_dim, heads, kv_heads, "bf16", "aim", metric), None)
    default = launches_for(head_dim)
    sizes = heads, kv_heads, kv_heads
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    sides = [[torch.empty(1, x, y.shape[1], head_dim, **meta) for x in sizes] for y in ids]
    with (
        mock.patch.object(JITFunction, "run", lambda *x, grid, warmup, **y: launches.append((x, y))),
        mock.patch.object(configs, "target_of", return_value="cuda:90"),
    ):
        changed = replace(default, **{kernel: launch or getattr(default, kernel)})
        value_and_gradients(*sides, grouped_plan(*ids, metric=metric).to("meta"), changed, metric=metric)
    for (function, *arguments), constants in launches:
        if function.__name__ == f"grouped_{kernel}_kernel":
            case = kernel_report.Case("bfloat16", head_dim)
            job = kernel_report.make_job(case, "sm_90", metric, function, arguments, constants)
            source = ASTSource(function, job.signature, job.constants, job.attributes)
            triton.compile(source, target=kernel_report.gpu_target("sm_90"), options=job.options)


class Printed(dict):
    """Says what is put into it at once: a run may be cut off before its end."""

    def __setitem__(self, name, value) -> None:
        super().__setitem__(name, value)
        print(f"    {name}: {value}", flush=True)


def steps(shape: Shape, inputs):
    """Loss and gradients, both ways, from plans made on the CPU."""
    teacher, student, *ids = inputs
    student = tuple(x.requires_grad_() for x in student)
    device = student[0].device
    plan = plan_of(shape, inputs, ids).to(device)
    columns = grouped_plan(*ids, metric=shape.metric).to(device)

    def shipped():
        loss = matt_kernels.aim_loss(teacher, student, plan=plan, metric=shape.metric)
        return loss.detach(), *torch.autograd.grad(loss, student)

    @torch.no_grad()
    def grouped(launches=None):
        return value_and_gradients(teacher, student, columns, launches, metric=shape.metric)

    return shipped, grouped


def best_launches(step, milliseconds, found: dict, best: Launches, deadline: float = float("inf")) -> Launches:
    """One kernel after the other; the time of each candidate goes into `found`."""
    shortest = float("inf")
    for change in [*({"share": x} for x in SHARES), *({kernel: launch} for kernel, launch in candidates())]:
        if time.monotonic() > deadline:
            found["not tried"] = "the minutes were over"
            break
        launches = replace(best, **change)
        try:
            taken = milliseconds(lambda launches=launches: step(launches))
        except Exception as problem:
            taken = f"{type(problem).__name__}: {str(problem)[:100]}"
        found[str(change)] = taken
        if isinstance(taken, float) and taken < shortest:
            shortest, best = taken, launches
    found["best"] = str(best)
    return best
