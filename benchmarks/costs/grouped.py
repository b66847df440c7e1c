"""The prototype of columns grouped by the shape of their segment (gpu_bench/grouped) in the model of the others: what
its loops compile to, the turns that they make, and the time of a loss beside that of the kernels that ship.

    python benchmarks/cost_model.py --grouped      compiles for sm_90 and writes benchmarks/grouped.json first
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from costs.gpus import GPUS, Cost, Gpu, Shape
from costs.kernels import Case, aim_columns, aim_rows, case_of, config_of, factors, kernels, softmax, torch_around
from gpu_bench.grouped.layout import SHAPES, TILE, GroupedPlan, grouped_plan
from gpu_bench.grouped.loss import launches_for, value_and_gradients
from gpu_bench.inputs import Shape as TextShape
from gpu_bench.inputs import segments_of
from matt_kernels import aim_plan, configs
from triton.runtime.jit import JITFunction

ROWS = Path(__file__).parents[1] / "grouped.json"
TARGET = "sm_90"


def jobs(head_dim: int, metric: str) -> list:
    """What kernel_report compiles of rows and columns: (kernel, group, job)."""
    import kernel_report

    recorded = []
    ids = segments_of(TextShape(1000, head_dim, 32, 8, "bf16", "aim", metric), None)
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    sides = [[torch.empty(1, x, y.shape[1], head_dim, **meta) for x in (32, 8, 8)] for y in ids]
    with (
        mock.patch.object(JITFunction, "run", lambda *x, grid, warmup, **y: recorded.append((x, y))),
        mock.patch.object(configs, "target_of", return_value=kernel_report.config_target(TARGET)),
    ):
        value_and_gradients(*sides, grouped_plan(*ids).to("meta"), metric=metric)
    found, case = [], kernel_report.Case("bfloat16", head_dim)
    for (function, *arguments), constants in recorded:
        name = function.__name__.removeprefix("grouped_").removesuffix("_kernel")
        if name in ("rows", "columns") and function.__name__.startswith("grouped_"):
            job = kernel_report.make_job(case, TARGET, metric, function, arguments, constants)
            parts = [replace(job, constants=job.constants | {"GROUPS": 1 << x}) for x in range(len(SHAPES))]
            found += [(name, group, x) for group, x in enumerate(parts)]
    return found


def compile_all() -> list[dict]:
    """Rows of grouped.json. A program of all groups, which is what runs, has the shared memory of the largest one."""
    import kernel_report

    rows = []
    for metric in ("mse", "cosine"):
        for head_dim in (64, 128):
            found = [(x, y, kernel_report.compile_row(z)) for x, y, z in jobs(head_dim, metric)]
            for kernel, group, row in found:
                largest = max(x["shared"] for name, _, x in found if name == kernel)
                whole = row | {"shared": largest, "registers": max(x["registers"] for _, _, x in found)}
                row |= {"occupancy": kernel_report.occupancy(whole, row["warps"], TARGET)}
                kept = ("registers", "spill_stores", "spill_loads", "tensor", "shared", "warps", "occupancy", "loop")
                rows.append({"name": name_of(kernel, group, metric, head_dim), **{x: row[x] for x in kept}})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def name_of(kernel: str, group: int, metric: str, head_dim: int) -> str:
    return f"{kernel} {'{}-{}'.format(*SHAPES[group])} {metric} d={head_dim}"


def compiled() -> dict[str, dict]:
    return {x["name"]: x for x in json.loads(ROWS.read_text())}


@dataclass(frozen=True)
class Loop(Cost):
    """A loop over the columns of one group."""

    compiled: dict = field(default_factory=dict)

    def row(self, gpu: Gpu, shape: Shape) -> dict | None:
        return self.compiled


def turns_of_rows(plan: GroupedPlan, group: int, block_m: int, block_n: int) -> int:
    """Tiles of a group that blocks of rows pass, of one head."""
    bounds = plan.bounds[0].numpy().reshape(4, plan.lists, 2, -1)[group]
    start, count = int(plan.starts[0, group]), int(plan.plan.counts[0, 0])
    turns = 0
    for first in range(0, count, block_m):
        low, high = (bounds[:, x, first : min(first + block_m, count)] for x in (0, 1))
        low, high = int(low.min()), int(high.max())
        turns += max(0, -(-(high - start) // block_n) - max(min(low, high) - start, 0) // block_n)
    return turns


def turns_of_columns(plan: GroupedPlan, group: int, block_m: int) -> int:
    tiles = plan.tiles[0].numpy()
    own = tiles[:, tiles[0] == group]
    return int((-(-(own[2] - own[1]) // block_m)).sum())


def costs(plan: GroupedPlan, case: Case, metric: str) -> list[Cost]:
    """Of one loss with all gradients; `case` has the plan of all rows."""
    shape, dim, rows = case.shape, case.config.block_d, compiled()
    launches = launches_for(shape.head_dim)
    found = [softmax(case, 0), softmax(case, 1)]
    tokens = sum(case.geometry.lengths)
    capacity = plan.columns.shape[2]
    permuted = 4 * capacity * dim * shape.size + 13 * 4 * capacity
    found.append(case.cost("columns made", [], private=shape.kv_heads * (2 * tokens * dim * shape.size + permuted)))
    for kernel, launch in (("rows", launches.rows), ("columns", launches.columns)):
        for group, (teacher, student) in enumerate(SHAPES):
            if kernel == "rows":
                block_m, block_n = launch.block_m, launch.block_n[group > 0]
                turns = turns_of_rows(plan, group, block_m, block_n)
                scores = turns * block_m * block_n
            else:
                block_m = launch.block_n[group > 1]
                turns = turns_of_columns(plan, group, block_m)
                scores = turns * block_m * TILE
            name = name_of(kernel, group, metric, shape.head_dim)
            made = case.cost(
                name,
                [case.score(scores * (teacher + student) * dim, 0), case.loop(scores * student * dim, 0)],
                exponentials=shape.heads * scores * (teacher + student + 2 * (metric == "cosine")),
                turns=shape.heads * turns,
            )
            found.append(Loop(**{**vars(made), "compiled": rows[name]}))
    # Sums of the programs of a key head, written, read and rounded.
    sums = 2 * case.geometry.lengths[1] * dim * shape.kv_heads * (launches.share * 8 + shape.size)
    found.append(case.cost("sums", [], private=sums * (launches.share > 1)))
    if plan.others is not None:
        others = case_of(plan.others, shape, metric, "cuda:90")
        moved = plan.moved_counts.sum().item() * 3 * dim * shape.size * 2
        found.append(case.cost("others moved", [], private=shape.kv_heads * moved))
        parts = [factors(others), aim_rows(others, metric), aim_columns(others, metric)]
        found += [replace(x, name=f"others: {x.name}") for x in parts]
    return [*found, torch_around(case, "aim")]


def compare(head_dim: int, metric: str, length: int, gpu: Gpu) -> tuple[dict, dict]:
    """Milliseconds (from, to) by kernel, of what ships and of the prototype, on the text of gpu_bench/inputs.py."""
    shape = Shape(head_dim=head_dim)
    ids = segments_of(TextShape(length, head_dim, 32, 8, "bf16", "aim", metric), None)
    plan = aim_plan(*ids, widths=config_of(shape, metric, gpu.target, lopsided=False).widths)
    case = case_of(plan, shape, metric, gpu.target)

    def by_name(parts):
        return {x.name: tuple(1e3 * y for y in x.expected(gpu, shape)) for x in parts}

    return by_name(kernels(case, "aim", metric)), by_name(costs(grouped_plan(*ids, metric=metric), case, metric))


HEAD = ["metric", "head_dim", "student tokens", "ships", "grouped", "ratio", "rows", "columns", "other segments"]


def comparison_rows(lengths=(1024, 4096, 16384)) -> list[list]:
    """Rows of a table: milliseconds from and to, of both, and of the prototype rows, columns and other segments."""
    gpu = next(x for x in GPUS if x.name == "H100 SXM")
    rows = []
    for metric in ("mse", "cosine"):
        for head_dim in (64, 128):
            for length in lengths:
                shipped, grouped = compare(head_dim, metric, length, gpu)
                every = [np.sum(list(x.values()), 0) for x in (shipped, grouped)]
                parts = [_sum(grouped, x) for x in ("rows ", "columns ", "others")]
                rows.append([metric, head_dim, length, *map(_range, every), f"{every[1][1] / every[0][1]:.2f}"])
                rows[-1] += [f"{x[1]:.2f}" for x in parts]
    return rows


def _sum(found: dict, begins: str):
    return np.sum([y for x, y in found.items() if x.startswith(begins)] or [(0, 0)], 0)


def _range(numbers) -> str:
    return "{:.2f} to {:.2f}".format(*numbers)
