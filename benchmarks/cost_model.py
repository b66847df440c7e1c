"""Modelled, not measured: what every kernel issues, needs and moves, and its floor at the peak of seven GPUs.

    python benchmarks/cost_model.py            writes benchmarks/COST.md
    python benchmarks/cost_model.py --grouped  compiles the loops of the grouped prototype first (grouped.json)

The plan of real text (real tokenizers, real segments) says which loops run; the loops as the kernels have them say
what each turn multiplies. tests/test_cost_model.py holds both against what the kernels multiply in the interpreter.

issued   multiply-adds (times 2) of all products, padding, masked rows and tokens and split operands included
useful   the same products on pairs (row, token it sees) at true sizes; products with factors per segment, not per tile
floor    the longest of: products at the tensor cores' peak, exponentials (and reciprocal roots) at the special function
         units' peak, bytes at the memory's peak. Nothing overlaps between kernels, everything within one.
issue    instructions of the main loops as compiled (kernels.json), one a cycle from each of 4 schedulers
shared   bytes that these move to and from shared memory, and that tensor cores read there (Hopper), 128 a cycle
bytes    what programs of one key head read in common counts once if that of all heads at work fits in half the L2,
         else once for every wave of programs (2 per multiprocessor), never more than if each read for itself.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "kernels"))
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from costs import grouped
from costs.gpus import FLASH, GPUS, WAIT, Gpu, Shape
from costs.kernels import case_of, config_of, flash, kernels, ratio_to_flash, total, waste
from costs.texts import PAIRS, Pair
from costs.update import UPDATE_BYTES, update_cost
from matt_kernels import AimPlan, aim_plan
from matt_kernels.configs import is_lopsided
from usage import arguments

LENGTH = 4096
WIDTHS = ((16, 16), (16, 32), (32, 16), (32, 32), (64, 64))
LOSSES = (("aim", "mse"), ("aim", "cosine"), ("aim_star", "mse"))
HEADER = """# Cost of the kernels: modelled, not measured

Written by `make cost-model`. **No number below is a measurement**: all follow from the loops of the kernels, the tile
shapes of `matt_kernels/configs.py`, plans of real text under real tokenizers, and the peaks that makers state. No
kernel reaches those, ours (small tiles, chains of dependent products) less than flash attention: a ratio says what
shapes and passes cost, it is no forecast.

"""

EXPECTED = f"""Floors let everything inside a kernel overlap and issue every cycle. Triton waits for each product before
it goes on: here the steps of a turn follow each other (products, at the rate at which shared memory feeds them on
Hopper; instructions as compiled; bytes to and from shared memory; {WAIT} cycles for two loads, one behind the other,
where nothing is fetched ahead). The lower number lets the programs on one multiprocessor overlap perfectly; the upper
one not at all, and has each scheduler, which has two warps, issue every second cycle. Flash attention is assumed at
{FLASH["H100 SXM"][1]:.0%} (d=64: {FLASH["H100 SXM"][0]:.0%}) of the H100's and {FLASH["A100 SXM"][1]:.0%}
({FLASH["A100 SXM"][0]:.0%}) of the A100's peak, about what its version 2 reaches; newer ones are faster on Hopper.
Launches, host time and the plan are not in it. Which end is nearer only a GPU tells; the upper one is believable.
"""
GROUPED = """## Columns grouped by the shape of their segment: a prototype

Segments that span 1-1, 1-2, 2-1 and 2-2 tokens each in a list of its own, keys permuted, factors a few numbers a
column: no products with matrices of factors. `benchmarks/gpu_bench/grouped` computes value and gradients of both
metrics for any segments (others in today's tiles) and runs in the interpreter; [docs/kernels.md](../docs/kernels.md)
has what it compiles to. The model above (the H100's cycles, bfloat16, 32 and 8 heads, the German text of
`gpu_bench/inputs.py`), in milliseconds of a loss with all gradients: lower and upper number of what ships and of the
prototype, the ratio of the upper ones, and upper numbers of the prototype's parts. The upper number of what shipped
before was short by 4% and 5% for mse at 4,096 tokens on the H200; of the cosine nothing was measured. Certain is what
it is made of: turns of the loops, and instructions, bytes and spills of each turn as compiled for sm_90. How they
overlap is assumed; launches (of some 10 us each at 1,024 tokens) are not in it.

"""


def plan_of(segments: list[torch.Tensor], widths: tuple[int, int], variant: str = "aim") -> AimPlan:
    return aim_plan(*segments, widths=widths, variant=variant)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines) + "\n"


def text_table(texts: dict[str, list[torch.Tensor]]) -> str:
    rows = []
    for name, segments in texts.items():
        sizes = [torch.bincount(x[x >= 0]) for x in segments]
        tokens, longest = [x.shape[1] for x in segments], [int(x.max()) for x in sizes]
        rows.append([name, *tokens, len(sizes[0]), f"{longest[0]}, {longest[1]}"])
    return table(["pair", "teacher tokens", "student tokens", "segments", "most tokens of one"], rows)


def plan_as_shipped(segments: list[torch.Tensor], shape: Shape, variant: str, metric: str, target: str) -> AimPlan:
    """In the tiles that configs.py has for texts of these lengths."""
    lopsided = is_lopsided(*(x.shape[1] for x in segments))
    return plan_of(segments, config_of(shape, metric, target, lopsided=lopsided).widths, variant)


def waste_table(texts, shape: Shape, gpu: Gpu) -> str:
    rows = []
    for name, segments in texts.items():
        for variant, metric in LOSSES:
            shipped = plan_as_shipped(segments, shape, variant, metric, gpu.target)
            plans = [*(plan_of(segments, x, variant) for x in WIDTHS), shipped]
            costs = (kernels(case_of(x, shape, metric, gpu.target), variant, metric) for x in plans)
            rows.append([name, variant, metric, *(f"{waste(x):.2f}" for x in costs)])
    return table(["pair", "variant", "metric", *(f"{x} x {y}" for x, y in WIDTHS), "as shipped"], rows)


def ratio_table(segments, widths: tuple[int, int] | None) -> str:
    """`widths` None: those that configs.py has."""
    rows = []
    for head_dim in (64, 128, 256):
        shape = Shape(head_dim=head_dim)
        for variant, metric in LOSSES:
            cells = []
            for gpu in GPUS:
                shipped = plan_as_shipped(segments, shape, variant, metric, gpu.target)
                plan = plan_of(segments, widths, variant) if widths else shipped
                cells.append(f"{ratio_to_flash(plan, shape, gpu, variant, metric):.2f}")
            rows.append([head_dim, variant, metric, *cells])
    return table(["head_dim", "variant", "metric", *(x.name for x in GPUS)], rows)


def kernel_table(segments, shape: Shape, variant: str, metric: str, gpu: Gpu) -> str:
    case = case_of(plan_as_shipped(segments, shape, variant, metric, gpu.target), shape, metric, gpu.target)
    rows = []
    for cost in [*kernels(case, variant, metric), *flash(case)]:
        seconds = cost.seconds(gpu) | {"issue": None, "shared": None} | cost.compiled_seconds(gpu, shape)
        rows.append(
            [
                cost.name,
                f"{cost.flops / 1e9:.1f}",
                f"{cost.useful / 1e9:.1f}",
                f"{cost.flops / cost.useful:.2f}" if cost.useful else "-",
                f"{cost.exponentials / 1e9:.2f}",
                f"{cost.bytes(gpu) / 1e6:.0f} ({(cost.private + cost.common) / 1e6:.0f} to "
                f"{(cost.private + max(cost.common, cost.each)) / 1e6:.0f})",
                *("-" if x is None else f"{x * 1e6:.0f}" for x in seconds.values()),
                cost.binding(gpu, shape),
            ]
        )
    head = ["kernel", "GFLOP issued", "useful", "issued / useful", "10⁹ exponentials", "MB moved (once to each)"]
    return table([*head, *(f"µs {x}" for x in seconds), "binds"], rows)


def length_table(pair: Pair, shape: Shape, gpu: Gpu) -> str:
    rows = []
    for length in (512, 1024, 4096, 16384):
        segments = pair.segments(length)
        for variant, metric in LOSSES:
            plan = plan_as_shipped(segments, shape, variant, metric, gpu.target)
            costs = kernels(case_of(plan, shape, metric, gpu.target), variant, metric)
            ratio = ratio_to_flash(plan, shape, gpu, variant, metric)
            rows.append(
                [length, variant, metric, f"{waste(costs):.2f}", f"{total(costs, gpu) * 1e6:.0f}", f"{ratio:.2f}"]
            )
    return table(["student tokens", "variant", "metric", "issued / useful", "µs floor", "over flash"], rows)


def expected_table(segments, gpus: list[Gpu]) -> str:
    rows = []
    for gpu in gpus:
        for head_dim, share in zip((64, 128), FLASH[gpu.name], strict=True):
            shape = Shape(head_dim=head_dim)
            for variant, metric in LOSSES:
                case = case_of(plan_as_shipped(segments, shape, variant, metric, gpu.target), shape, metric, gpu.target)
                costs = kernels(case, variant, metric)
                try:
                    found = [x.expected(gpu, shape) for x in costs]
                except LookupError as error:
                    print(f"left out: {error}")
                    continue
                parts = {}
                for cost, (low, high) in zip(costs, found, strict=True):
                    before = parts.get(name := cost.name.split(",")[0], (0, 0))
                    parts[name] = before[0] + low, before[1] + high
                loss = [sum(x) for x in zip(*found, strict=True)]
                attention = sum(x.useful for x in flash(case)) / (share * gpu.teraflops * 1e12)
                large = (f"{name} {_range(x, 1e3)}" for name, x in parts.items() if x[1] > 0.04 * loss[1])
                rows.append([gpu.name, head_dim, variant, metric, ", ".join(large), f"{1e3 * total(costs, gpu):.2f}"])
                rows[-1] += [_range(loss, 1e3), f"{1e3 * attention:.2f}", _range(loss, 1 / attention, 1)]
    head = ["GPU", "head_dim", "variant", "metric", "ms of kernels", "floor", "ms", "flash attention", "ratio"]
    return table(head, rows)


def _range(numbers, factor: float, digits: int = 2) -> str:
    low, high = (f"{factor * x:.{digits}f}" for x in numbers)
    return f"{low} to {high}"


def update_table() -> str:
    rows = []
    for count, hidden in ((500, 576), (2000, 576), (4000, 2048), (8000, 4096)):
        operations, moved = update_cost(count, hidden)
        fused = UPDATE_BYTES * count * hidden
        cells = [f"{x / gpu.terabytes / 1e6:.0f}" for gpu in GPUS if "SXM" in gpu.name for x in (moved, fused)]
        each = f"{moved / count / hidden:.0f}"
        rows.append([f"{count:,} x {hidden:,}", operations, each, UPDATE_BYTES, *cells])
    names = [f"µs {gpu.name}, {way}" for gpu in GPUS if "SXM" in gpu.name for way in ("torch", "kernel")]
    return table(["rows x hidden", "launches, torch", "bytes an element, torch", "kernel", *names], rows)


def gpu_table() -> str:
    rows = [
        [x.name, x.teraflops, x.terabytes, f"{x.exponentials / 1e12:.2f}", x.cache_megabytes, x.target] for x in GPUS
    ]
    head = ["GPU", "dense bf16 TFLOP/s", "TB/s", "10¹² exponentials/s", "MB of cache counted on", "configs for"]
    return table(head, rows)


def load_texts() -> dict[str, list[torch.Tensor]]:
    texts = {}
    for pair in PAIRS:
        try:
            texts[pair.name] = pair.segments(LENGTH)
        except LookupError as error:
            print(f"left out: {error}")
    return texts


def report() -> str:
    texts, shape = load_texts(), Shape()
    by_name = {x.name: x for x in GPUS}
    parts = [HEADER, "## How it is counted\n\n```\n" + __doc__.split("\n\n", 2)[2].strip() + "\n```\n"]
    parts += [
        "Operands of products: tf32 at half the bf16 rate, tf32x3 three such products, fp32 matrix products (AMD) at "
        "an eighth. Shapes: one document, 32 query heads, 8 key heads, bf16, causal, all three gradients. Work outside "
        "tensor cores and special function units is not in the model.\n",
        gpu_table(),
        "## Texts\n",
        "Held out from the new tokenizers' training. Python: standard library; German and Russian: this machine's "
        "manual pages; English: the language reference inside Python.\n",
        text_table(texts),
    ]
    for head_dim in (64, 128, 256):
        parts += [
            f"## Flops issued / useful, head_dim {head_dim}, by tile width (teacher x student) — modelled\n",
            "All kernels of one loss, forward and backward. The goal is 2.0 at most.\n",
            waste_table(texts, Shape(head_dim=head_dim), by_name["H100 SXM"]),
        ]
    for name, segments in texts.items():
        for widths in (None, (16, 16), (32, 16)):
            tiles = "tiles as in configs.py" if widths is None else "tiles of {} x {}".format(*widths)
            parts += [
                f"## Forward + backward over flash attention's, {name}, {tiles} — modelled\n",
                "Flash attention: forward and backward at the student's shape, 7 products. The goal is 1.5 at most.\n",
                ratio_table(segments, widths),
            ]
    segments = next(iter(texts.values()))
    parts += [
        f"## What to expect, {PAIRS[0].name} — modelled\n",
        EXPECTED,
        expected_table(segments, [by_name[x] for x in FLASH]),
        GROUPED,
        table(grouped.HEAD, grouped.comparison_rows()),
    ]
    for gpu in ("A100 SXM", "H100 SXM"):
        for variant, metric in LOSSES:
            parts += [
                f"## Kernel by kernel, {gpu}, {variant} {metric}, head_dim {shape.head_dim}, {PAIRS[0].name} — "
                "modelled\n",
                kernel_table(segments, shape, variant, metric, by_name[gpu]),
            ]
    parts += [
        f"## By length, H100 SXM, head_dim {shape.head_dim}, {PAIRS[0].name} — modelled\n",
        length_table(PAIRS[0], shape, by_name["H100 SXM"]),
    ]
    parts += [
        "## The update of embedding rows — modelled\n",
        "Lazy AdamW in float32: torch operations as `RowAdamW` has them, counted as they run, against one launch of "
        "adamw_rows. Times are bytes at the memory's peak; a launch takes a few µs more, so that up to some thousand "
        "rows of a small model it is the launches that the kernel saves.\n",
        update_table(),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    if arguments(__doc__, ["--grouped"].index):
        grouped.ROWS.write_text(json.dumps(grouped.compile_all(), indent=1) + "\n")
    Path(__file__).with_name("COST.md").write_text(report())
    print("benchmarks/COST.md")
