"""Modelled, not measured: what every kernel issues, needs and moves, and its floor at the peak of seven GPUs.

    python benchmarks/cost_model.py        writes benchmarks/COST.md

The plan of real text (real tokenizers, real segments) says which loops run; the loops as the kernels have them say
what each turn multiplies. tests/test_cost_model.py holds both against what the kernels multiply in the interpreter.

issued   multiply-adds (times 2) of all products, padding, masked rows and tokens and split operands included
useful   the same products on pairs (row, token it sees) at true sizes; products with factors per segment, not per tile
floor    the longest of: products at the tensor cores' peak, exponentials (and reciprocal roots) at the special function
         units' peak, bytes at the memory's peak. Nothing overlaps between kernels, everything within one.
issue    instructions of the main loops as compiled (kernels.json), one a cycle from each of 4 schedulers
shared   bytes that these move to and from shared memory, 128 a cycle; without what tensor cores read there themselves
bytes    what programs of one key head read in common counts once if that of all heads at work fits in half the L2,
         else once for every wave of programs (2 per multiprocessor), never more than if each read for itself.
"""

from __future__ import annotations

import functools
import gzip
import json
import pydoc_data.topics
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "kernels"))
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from matt_kernels import AimPlan, aim_plan
from matt_kernels.configs import Config, choose_config
from real_tokenizers import REAL_TOKENIZERS, cached, standard_library

from matt_fast.embeddings import RowAdamW
from matt_fast.segments import align_segments


@dataclass(frozen=True)
class Gpu:
    """Dense peak with float32 sums, from the makers' data sheets; one special function unit result in 16 lanes."""

    name: str
    target: str
    teraflops: float  # bf16 and fp16
    terabytes: float
    processors: int
    gigahertz: float
    cache_megabytes: float  # L2, for MI300X the cache behind it

    @property
    def exponentials(self) -> float:
        return self.processors * 16 * self.gigahertz * 1e9


GPUS = (
    Gpu("A100 SXM", "cuda:80", 312, 2.039, 108, 1.41, 40),
    Gpu("RTX 3090", "cuda:86", 71, 0.936, 82, 1.695, 6),
    Gpu("RTX 4090", "cuda:89", 165.2, 1.008, 128, 2.52, 72),
    Gpu("H100 SXM", "cuda:90", 989.4, 3.35, 132, 1.83, 50),
    Gpu("B200", "cuda:100", 2250, 8.0, 148, 1.85, 126),
    Gpu("RTX 5090", "cuda:120", 209.5, 1.792, 170, 2.407, 96),
    Gpu("MI300X", "hip", 1307.4, 5.3, 304, 2.1, 256),
)

# (products on tensor cores that one product takes, share of the bf16 peak)
OPERANDS = {"bf16": (1, 1), "fp16": (1, 1), "tf32": (1, 1 / 2), "tf32x3": (3, 1 / 2), "ieee": (1, 1 / 8)}
PROGRAMS_PER_PROCESSOR = 2
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bf16"

    @property
    def size(self) -> int:
        return 4 if self.dtype == "fp32" else 2


@dataclass(frozen=True)
class Product:
    operand: str
    issued: float  # multiply-adds times 2, before operands are split
    useful: float


@dataclass(frozen=True)
class Cost:
    """One kernel, all of its programs."""

    name: str
    products: list[Product] = field(default_factory=list)
    exponentials: float = 0
    private: float = 0  # bytes that one program alone reads or writes
    common: float = 0  # bytes that programs of one key head read in common, each byte once
    each: float = 0  # the same if every program reads for itself
    programs: float = 1  # of one key head
    kv_heads: int = 1  # of the whole batch
    kernel: str = ""  # as kernels.json calls it
    turns: float = 0  # of its main loop, all programs

    @property
    def products_issued(self) -> float:
        return sum(x.issued for x in self.products)

    @property
    def flops(self) -> float:
        return sum(x.issued * OPERANDS[x.operand][0] for x in self.products)

    @property
    def useful(self) -> float:
        return sum(x.useful for x in self.products)

    def bytes(self, gpu: Gpu) -> float:
        resident = PROGRAMS_PER_PROCESSOR * gpu.processors
        at_work = min(self.kv_heads, max(1.0, resident / self.programs))
        held = self.common / self.kv_heads * at_work <= gpu.cache_megabytes * 1e6 / 2
        waves = 1.0 if held else max(1.0, self.programs / resident)
        return self.private + min(self.each, self.common * waves)

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        peaks = {name: gpu.teraflops * 1e12 * share / times for name, (times, share) in OPERANDS.items()}
        return {
            "products": sum(x.issued / peaks[x.operand] for x in self.products),
            "exponentials": self.exponentials / gpu.exponentials,
            "memory": self.bytes(gpu) / (gpu.terabytes * 1e12),
        }

    def compiled_seconds(self, gpu: Gpu, shape: Shape) -> dict[str, float]:
        """What the main loop as compiled needs beside; nothing where it was not read (AMD, flash attention)."""
        name = f"{self.kernel} {LONG_NAMES[shape.dtype]} d={shape.head_dim} {gpu.target.replace('cuda:', 'sm_')}"
        row = compiled().get(name)
        if row is None or row["loop"] is None:
            return {}
        cycles = self.turns * row["warps"] / (gpu.processors * gpu.gigahertz * 1e9)
        loop = row["loop"]
        return {"issue": cycles * loop["instructions"] / 4, "shared": cycles * loop["shared_bytes"] / 128}

    def floor(self, gpu: Gpu) -> float:
        return max(self.seconds(gpu).values())

    def binding(self, gpu: Gpu, shape: Shape | None = None) -> str:
        seconds = self.seconds(gpu) | (self.compiled_seconds(gpu, shape) if shape else {})
        return max(seconds, key=seconds.get)


@functools.cache
def compiled() -> dict[str, dict]:
    """Rows of the kernel report by name."""
    return {x["name"]: x for x in json.loads(Path(__file__).with_name("kernels.json").read_text())}


# What the loops of a plan do


class Geometry:
    """Loops over a plan, counted: turns are of one head (rows) or one head of a key head (columns)."""

    def __init__(self, plan: AimPlan):
        self.rows, self.tiles = plan.rows.numpy().astype(np.int64), plan.tiles.numpy().astype(np.int64)
        self.long, self.counts = plan.long.numpy(), plan.counts.numpy().astype(np.int64)
        self.ids = plan.teacher_segments.numpy(), plan.student_segments.numpy()
        self.batch, _, self.row_limit = self.rows.shape
        self.lengths = tuple(x.shape[1] for x in self.ids)

    def row_blocks(self, block_m: int) -> int:
        return -(-self.row_limit // block_m)

    def token_turns(self, side: int, block_m: int, block_n: int) -> tuple[int, int]:
        """(turns, tokens passed) of loops over the tokens that some row of a block sees: softmax, attend."""
        lows, highs = self._by_block(2 + 2 * side, 3 + 2 * side, block_m)
        spans = (highs - lows).clip(min=0)
        return int((-(-spans // block_n)).sum()), int(spans.sum())

    def tile_turns(self, block_m: int) -> tuple[int, int, int]:
        """(turns, teacher tokens passed, student tokens passed) of aim_rows."""
        lows, highs = self._by_block(6, 7, block_m)
        turns, passed = 0, np.zeros(2, np.int64)
        for batch, (low, high) in enumerate(zip(lows, highs, strict=True)):
            tokens = np.stack(
                [self.tiles[batch, 1] - self.tiles[batch, 0], self.tiles[batch, 3] - self.tiles[batch, 2]]
            )
            before = np.concatenate([np.zeros((2, 1), np.int64), tokens.cumsum(1)], 1)
            low = np.minimum(low, high)
            turns += int((high - low).sum())
            passed += (before[:, high] - before[:, low]).sum(1)
        return turns, *passed.tolist()

    def column_turns(self, block_m: int, *, long: bool) -> tuple[int, int]:
        """(turns, rows passed) of aim_columns and attend_columns; `long`: tiles of long segments too."""
        rows = (self.tiles[:, 5] - self.tiles[:, 4]) * self._wanted(long)
        return int((-(-rows // block_m)).sum()), int(rows.sum())

    def tile_count(self, *, long: bool = True) -> int:
        return int(self._wanted(long).sum())

    def seen(self, side: int) -> int:
        """Pairs (row, token it sees)."""
        used = np.arange(self.row_limit) < self.counts[:, :1]
        return int(((self.rows[:, 3 + 2 * side] - self.rows[:, 2 + 2 * side]).clip(min=0) * used).sum())

    def seen_products(self, side: int, other: int) -> int:
        """Over pairs (row, token it sees on `side`), the tokens that the token's segment has on `other`."""
        total = 0
        for batch in range(self.batch):
            used = self.rows[batch, :, : self.counts[batch, 0]]
            before = np.concatenate([[0], np.cumsum(self._partners(batch, side, other))])
            total += int((before[used[3 + 2 * side]] - before[used[2 + 2 * side]]).sum())
        return total

    def segment_products(self, *powers: int) -> int:
        """Sum over segments of teacher tokens ** first times student tokens ** second."""
        total = 0
        for sizes in (self._sizes(batch) for batch in range(self.batch)):
            total += int((sizes[0] ** powers[0] * sizes[1] ** powers[1]).sum())
        return total

    def _by_block(self, low: int, high: int, block_m: int):
        """First and last of a range over the used rows of each block; empty for blocks without a row."""
        blocks = self.row_blocks(block_m)
        padding = ((0, 0), (0, blocks * block_m - self.row_limit))
        used = np.pad(np.arange(self.row_limit) < self.counts[:, :1], padding)
        lows = np.where(used, np.pad(self.rows[:, low], padding), 2**31 - 1).reshape(self.batch, blocks, block_m)
        highs = np.where(used, np.pad(self.rows[:, high], padding), 0).reshape(self.batch, blocks, block_m)
        return lows.min(2), highs.max(2)

    def _wanted(self, long: bool) -> np.ndarray:
        wanted = np.arange(self.tiles.shape[2]) < self.counts[:, 1:2]
        return wanted if long else wanted & (self.tiles[:, 6] < 0)

    def _sizes(self, batch: int) -> list[np.ndarray]:
        """Tokens of each segment on each side; segments longer than a tile, which have kernels of their own, have 0."""
        count, long_count = self.counts[batch, 0], self.counts[batch, 2]
        sizes = [np.bincount(ids[batch][ids[batch] >= 0], minlength=count) for ids in self.ids]
        for size in sizes:
            size[self.long[batch, 0, :long_count]] = 0
        return sizes

    def _partners(self, batch: int, side: int, other: int) -> np.ndarray:
        ids = self.ids[side][batch]
        return np.append(self._sizes(batch)[other], 0)[np.where(ids >= 0, ids, -1)]


# What each turn multiplies, kernel by kernel


@dataclass(frozen=True)
class Case:
    """A plan with the tensors' shape and the tile shapes that the kernels take for it."""

    geometry: Geometry
    shape: Shape
    config: Config
    widths: tuple[int, int]

    @property
    def key_heads(self) -> int:
        return self.geometry.batch * self.shape.kv_heads

    @property
    def group(self) -> int:
        return self.shape.heads // self.shape.kv_heads

    @property
    def factor_size(self) -> int:
        return 2 if self.config.factor_kind == "bf16" else 4

    @property
    def kept_size(self) -> int:
        """Bytes of a number that is kept for backward."""
        return 2 if self.shape.dtype == "bf16" else 4

    @property
    def sum_size(self) -> int:
        """Bytes of what is kept of a row's softmax."""
        return 4 * self.config.softmax_numbers

    @property
    def low(self) -> int:
        """1 where the lower digits of C are kept apart."""
        return int(self.config.factor_kind == "fp32")

    def parts(self, *, norms: bool = False) -> int:
        """bf16 parts of a number that is summed up over the columns of segments; norms of what gives the value."""
        return 3 if self.config.factor_kind == "fp32" else 1 + norms

    @property
    def score_operand(self) -> str:
        return self.shape.dtype if self.shape.dtype != "fp32" else self.config.score_precision

    @property
    def loop_operand(self) -> str:
        return "bf16" if self.config.kind == "bf16" else self.config.product_precision

    def score(self, issued: float, useful: float) -> Product:
        return Product(self.score_operand, 2 * self.shape.heads * issued, 2 * self.shape.heads * useful)

    def loop(self, issued: float, useful: float) -> Product:
        return Product(self.loop_operand, 2 * self.shape.heads * issued, 2 * self.shape.heads * useful)

    def factor(self, issued: float, useful: float) -> Product:
        operand = "bf16" if self.config.factor_kind == "bf16" else self.config.factor_precision
        return Product(operand, 2 * self.shape.heads * issued, 2 * self.shape.heads * useful)

    def sums(self, issued: float, useful: float) -> Product:
        return Product("bf16", 2 * self.shape.heads * issued, 2 * self.shape.heads * useful)

    def exact(self, issued: float, useful: float) -> Product:
        return Product(self.config.exact_precision, 2 * self.shape.kv_heads * issued, 2 * self.shape.kv_heads * useful)

    @property
    def flash_operand(self) -> str:
        return "tf32x3" if self.shape.dtype == "fp32" else self.shape.dtype

    def cost(self, name: str, products: list[Product], **rest) -> Cost:
        return Cost(name, products, kv_heads=self.key_heads, **rest)


def case_of(plan: AimPlan, shape: Shape, metric: str, target: str, config: Config | None = None) -> Case:
    """As the launchers choose it; the tiles are the plan's."""
    config = config or choose_config(shape.head_dim, shape.head_dim, DTYPES[shape.dtype], metric, target)
    return Case(Geometry(plan), shape, config, plan.widths)


def softmax(case: Case, side: int) -> Cost:
    launch, geometry, shape = case.config.softmax, case.geometry, case.shape
    turns, passed = geometry.token_turns(side, launch.block_m, launch.block_n)
    scores = turns * launch.block_m * launch.block_n
    rows, keys = geometry.batch * geometry.row_limit, geometry.batch * geometry.lengths[side]
    vector = shape.head_dim * shape.size
    return case.cost(
        f"softmax, {('teacher', 'student')[side]}",
        [
            case.score(scores * case.config.block_d, geometry.seen(side) * shape.head_dim),
            *([case.loop(scores * case.config.block_d, geometry.seen(side) * shape.head_dim)] * side),  # mean key
        ],
        exponentials=shape.heads * (scores + turns * launch.block_m),
        private=shape.heads * rows * (vector + case.sum_size + side * shape.head_dim * 4),
        common=shape.kv_heads * keys * vector,
        each=shape.heads * passed * vector,
        programs=geometry.row_blocks(launch.block_m) * case.group,
        kernel="softmax mse" + " mean key" * side,
        turns=shape.heads * turns,
    )


def factors(case: Case, *, rest: bool) -> Cost:
    """Once forward with the teacher's remainders, once backward, where mse does not need these."""
    teacher, student = case.widths
    geometry, dim, block_v = case.geometry, case.shape.head_dim, case.config.block_v
    padded, tiles = -(-dim // block_v) * block_v, geometry.tile_count()
    across, low = teacher * student * padded, case.low
    grams = student * student * padded + (3 + low) * across + (2 + low) * (1 + low) * across
    mixtures = (3 + low) * teacher * student * student
    remainders = (1 + low) * across + teacher * teacher * padded if rest else 0
    product = geometry.segment_products
    useful = product(0, 2) * dim + 5 * product(1, 1) * dim + 3 * product(1, 2)
    useful += (product(1, 1) + product(2, 0)) * dim if rest else 0
    tokens = geometry.batch * np.array(geometry.lengths)
    written = tokens @ [student * (1 + low) + teacher * rest, student] * case.factor_size
    read = tokens.sum() * dim * case.shape.size  # later passes over a tile's values find them in the cache
    return case.cost(
        f"factors{'' if rest else ' without remainders'}",
        [case.exact(tiles * (grams + mixtures + remainders), useful)],
        private=case.shape.kv_heads * (written + read),
    )


def small_products(case: Case, metric: str) -> tuple[float, float]:
    """(multiply-adds with factors for one row and tile, the same per segment) in both aim_rows and aim_columns: the
    mixture, and the products with the Gram matrix."""
    teacher, student = case.widths
    small = case.geometry.seen_products
    grams = 1 if metric == "mse" else 2
    return (1 + case.low) * teacher * student + grams * student * student, small(0, 1) + grams * small(1, 1)


def segment_sums(case: Case, *, columns: bool) -> tuple[float, float]:
    """The same of sums over the columns of segments, which cosine alone has: 0/1 products in bf16 parts."""
    teacher, student = case.widths
    small = case.geometry.seen_products
    norms, others = 2 * student * student + teacher * student, 2 * student * student + columns * student * teacher
    issued = case.parts(norms=not columns) * norms + case.parts() * others
    return issued, 4 * small(1, 1) + small(0, 1) + columns * small(1, 0)


def tile_bytes(case: Case, *, rest: bool = True) -> tuple[int, int]:
    """Bytes of key and factors for one token of the teacher and of the student."""
    teacher, student = case.widths
    vector = case.shape.head_dim * case.shape.size
    return vector + (student * (1 + case.low) + teacher * rest) * case.factor_size, vector + student * case.factor_size


def aim_rows(case: Case, metric: str) -> Cost:
    geometry, shape, launch = case.geometry, case.shape, case.config.rows
    teacher, student = case.widths
    turns, *passed = geometry.tile_turns(launch.block_m)
    rows = turns * launch.block_m
    seen, small = [geometry.seen(x) for x in (0, 1)], geometry.seen_products
    width, dim = case.config.block_d, shape.head_dim
    issued, useful = small_products(case, metric)
    sums = segment_sums(case, columns=False) if metric == "cosine" else (0, 0)
    token = tile_bytes(case)
    count, keys = geometry.batch * geometry.row_limit, geometry.batch * np.array(geometry.lengths)
    return case.cost(
        f"aim_rows, {metric}",
        [
            case.score(rows * (teacher + student) * width, sum(seen) * dim),
            case.loop(rows * student * width, seen[1] * dim),
            case.factor(rows * (issued + teacher * teacher), useful + small(0, 0)),
            case.sums(rows * sums[0], sums[1]),
        ],
        exponentials=shape.heads * rows * (teacher + student + (2 * student if metric == "cosine" else 0)),
        private=shape.heads * count * (dim * (2 * shape.size + case.kept_size + 4) + 2 * case.sum_size + 8),
        common=shape.kv_heads * float(keys @ token),
        each=shape.heads * float(np.dot(passed, token)),
        programs=geometry.row_blocks(launch.block_m) * case.group,
        kernel=f"aim_rows {metric}",
        turns=shape.heads * turns,
    )


def aim_columns(case: Case, metric: str) -> Cost:
    geometry, shape, launch = case.geometry, case.shape, case.config.columns
    teacher, student = case.widths
    turns, passed = geometry.column_turns(launch.block_m, long=False)
    rows, tiles = turns * launch.block_m, geometry.tile_count(long=False)
    seen, small = [geometry.seen(x) for x in (0, 1)], geometry.seen_products
    width, dim = case.config.block_d, shape.head_dim
    issued, useful = small_products(case, metric)
    sums = (0, 0)
    if metric == "cosine":
        issued, useful = issued + teacher * teacher, useful + small(0, 0)
        sums = segment_sums(case, columns=True)
    padded = -(-dim // case.config.block_v) * case.config.block_v
    product = geometry.segment_products
    count, keys = geometry.batch * geometry.row_limit, geometry.batch * np.array(geometry.lengths)
    row = 2 * (dim * shape.size + case.sum_size) + 4
    token = np.array(tile_bytes(case, rest=metric == "cosine")) + dim * shape.size + [0, 2 * dim * shape.size]
    return case.cost(
        f"aim_columns, {metric}",
        [
            case.score(rows * (teacher + student) * width, sum(seen) * dim),
            case.loop(rows * student * width, seen[1] * dim),
            case.loop(rows * (student * student + student * teacher), small(1, 1) + small(1, 0)),  # sums for dV
            case.factor(rows * issued, useful),
            case.sums(rows * sums[0], sums[1]),
            case.exact(
                tiles * ((2 + case.low) * teacher * student + student * student) * padded,
                (2 * product(1, 1) + product(0, 2)) * dim,
            ),
        ],
        exponentials=shape.heads * rows * (teacher + student + (2 * student if metric == "cosine" else 0)),
        private=shape.kv_heads * float(keys @ token),
        common=shape.heads * count * row,
        each=shape.heads * passed * row,
        programs=geometry.tile_count() / geometry.batch,
        kernel=f"aim_columns {metric}",
        turns=shape.heads * turns,
    )


def attend(case: Case, side: int) -> Cost:
    launch, geometry, shape, config = case.config.attend, case.geometry, case.shape, case.config
    turns, passed = geometry.token_turns(side, launch.block_m, launch.block_n)
    scores = turns * launch.block_m * launch.block_n
    rows, keys = geometry.batch * geometry.row_limit, geometry.batch * geometry.lengths[side]
    vector, useful = shape.head_dim * shape.size, geometry.seen(side) * shape.head_dim
    return case.cost(
        f"attend, {('teacher', 'student')[side]}",
        [case.score(scores * config.block_d, useful), case.loop(scores * config.block_dv, useful)],
        exponentials=shape.heads * (scores + turns * launch.block_m),
        private=shape.heads * rows * (vector + case.sum_size + 4 * shape.head_dim),
        common=shape.kv_heads * keys * 2 * vector,
        each=shape.heads * passed * 2 * vector,
        programs=geometry.row_blocks(launch.block_m) * case.group,
        kernel="attend star",
        turns=shape.heads * turns,
    )


def attend_distance(case: Case, metric: str) -> Cost:
    geometry, shape, block_m = case.geometry, case.shape, case.config.attend_distance.block_m
    rows = geometry.batch * geometry.row_limit
    roots = geometry.batch * geometry.row_blocks(block_m) * block_m * (2 if metric == "cosine" else 0)
    row = (8 + case.kept_size) * shape.head_dim + 12
    return case.cost(
        "attend_distance", [], exponentials=shape.heads * roots, private=shape.heads * rows * row,
        programs=geometry.row_blocks(block_m) * case.group,
    )  # fmt: skip


def attend_rows(case: Case) -> Cost:
    launch, geometry, shape, config = case.config.attend_rows, case.geometry, case.shape, case.config
    turns, passed = geometry.token_turns(1, launch.block_m, launch.block_n)
    scores = turns * launch.block_m * launch.block_n
    rows, keys = geometry.batch * geometry.row_limit, geometry.batch * geometry.lengths[1]
    vector, useful = shape.head_dim * shape.size, geometry.seen(1) * shape.head_dim
    return case.cost(
        "attend_rows",
        [
            case.score(scores * config.block_d, useful),
            case.loop(scores * (config.block_dv + config.block_d), 2 * useful),
        ],
        exponentials=shape.heads * scores,
        private=shape.heads * rows * (2 * vector + case.kept_size * shape.head_dim + case.sum_size + 4),
        common=shape.kv_heads * keys * 2 * vector,
        each=shape.heads * passed * 2 * vector,
        programs=geometry.row_blocks(launch.block_m) * case.group,
        kernel="attend_rows star",
        turns=shape.heads * turns,
    )


def attend_columns(case: Case) -> Cost:
    launch, geometry, shape, config = case.config.attend_columns, case.geometry, case.shape, case.config
    turns, passed = geometry.column_turns(launch.block_m, long=True)
    scores = turns * launch.block_m * case.widths[1]
    rows, keys = geometry.batch * geometry.row_limit, geometry.batch * geometry.lengths[1]
    vector, useful = shape.head_dim * shape.size, geometry.seen(1) * shape.head_dim
    row = vector + case.kept_size * shape.head_dim + case.sum_size + 4
    return case.cost(
        "attend_columns",
        [
            case.score(scores * config.block_d, useful),
            case.loop(scores * (2 * config.block_dv + config.block_d), 3 * useful),
        ],
        exponentials=shape.heads * scores,
        private=shape.kv_heads * keys * 4 * vector,
        common=shape.heads * rows * row,
        each=shape.heads * passed * row,
        programs=geometry.tile_count() / geometry.batch,
        kernel="attend_columns star",
        turns=shape.heads * turns,
    )


def torch_around(case: Case, variant: str) -> Cost:
    """Zeroed gradients; for aim, dQ times the incoming gradient."""
    shape = case.shape
    tokens = case.geometry.batch * case.geometry.lengths[1] * shape.head_dim
    moved = 2 * shape.kv_heads * tokens * shape.size
    moved += shape.heads * tokens * (shape.size if variant == "aim_star" else 2 * case.kept_size + shape.size)
    return case.cost("torch around them", [], private=moved)


def kernels(case: Case, variant: str, metric: str) -> list[Cost]:
    """Forward and backward, all three gradients wanted. Kernels of segments longer than a tile are not modelled."""
    if variant == "aim_star":
        costs = [attend(case, 0), attend(case, 1), attend_distance(case, metric), attend_rows(case)]
        costs.append(attend_columns(case))
    else:
        costs = [softmax(case, 0), softmax(case, 1), factors(case, rest=True), aim_rows(case, metric)]
        costs += [factors(case, rest=metric == "cosine"), aim_columns(case, metric)]
    return [*costs, torch_around(case, variant)]


def flash(case: Case, block_m: int = 128, block_n: int = 64) -> list[Cost]:
    """Flash attention of the student's shape, causal: 2 products forward, 5 backward, an exponential per score each."""
    shape, geometry = case.shape, case.geometry
    length = geometry.lengths[1]
    stops = np.minimum(np.arange(block_m, length + block_m, block_m), length)
    turns = int((-(-stops // block_n)).sum())
    scores, useful = turns * block_m * block_n, length * (length + 1) / 2
    dim, vector = case.config.block_d, shape.head_dim * shape.size
    tokens = geometry.batch * length
    operand, heads = case.flash_operand, case.geometry.batch * shape.heads
    programs = len(stops) * case.group

    def pass_(name, products, private, common, each):
        product = Product(operand, 2 * heads * products * scores * dim, 2 * heads * products * useful * shape.head_dim)
        return case.cost(
            name, [product], exponentials=heads * scores, private=private, common=common, each=each, programs=programs
        )

    keys = shape.kv_heads * tokens * 2 * vector
    passed = heads * turns * block_n * 2 * vector
    queries = shape.heads * tokens * (2 * vector + 4)
    # Backward owns keys and reads q and dO of all heads; dQ is summed up in float32, then converted; D from o and dO.
    summed = shape.heads * tokens * (4 * 2 * shape.head_dim + 4 * shape.head_dim + vector + 2 * vector + 8)
    return [
        pass_("flash forward", 2, queries, keys, passed),
        pass_("flash backward", 5, 2 * keys + summed, queries, heads * turns * block_m * 2 * vector),
    ]


def total(costs: list[Cost], gpu: Gpu) -> float:
    return sum(x.floor(gpu) for x in costs)


def waste(costs: list[Cost]) -> float:
    """Flops issued over useful flops."""
    return sum(x.flops for x in costs) / sum(x.useful for x in costs)


def ratio_to_flash(
    plan: AimPlan, shape: Shape, gpu: Gpu, variant: str, metric: str, config: Config | None = None
) -> float:
    case = case_of(plan, shape, metric, gpu.target, config)
    return total(kernels(case, variant, metric), gpu) / total(flash(case), gpu)


# Real text under two real tokenizers


def man_pages(language: str) -> list[str]:
    """Manual pages of this machine without their markup; none on many machines."""
    texts = []
    for file in sorted(Path("/usr/share/man", language).glob("man*/*.gz")):
        lines = gzip.decompress(file.read_bytes()).decode("utf-8", "ignore").splitlines()
        lines = (x for x in lines if x and x[0] not in ".'\\")
        text = re.sub(r"\\f\[?[A-Z]+\]?|\\&|\\,|\\/", "", "\n".join(lines)).replace("\\-", "-")
        texts.append(text)
    return texts


def byte_bpe(texts: list[str], size: int = 24_000):
    """A new tokenizer trained on `texts`, as one would for a language or for code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Pair:
    """Teacher tokenizer, student tokenizer, and the text both read: held out where the student's was trained."""

    name: str
    teacher: str
    student: str
    texts: Callable[[], list[str]]
    trained: bool = True

    def segments(self, length: int) -> list[torch.Tensor]:
        """Ids [1, n] of one document of at most `length` student tokens, cut behind a segment."""
        texts = self.texts()
        held_out = texts[::4] if self.trained else texts
        make = functools.partial(byte_bpe, [x for i, x in enumerate(texts) if i % 4])
        student = cached(f"cost-{self.student}", make) if self.trained else REAL_TOKENIZERS[self.student]()
        text = "\n\n".join(held_out)[: 8 * length]
        sides = [tokenized(x, text) for x in (REAL_TOKENIZERS[self.teacher](), student)]
        ids = align_segments(*(x[0] for x in sides), *(x[1] for x in sides))
        if len(ids[1]) < length:
            raise LookupError(f"{self.name}: the text must give {length} student tokens; got {len(ids[1])}")
        last = ids[1][:length].max() - 1
        stops = [int(np.flatnonzero(x == last).max()) + 1 for x in ids]
        return [torch.as_tensor(x[:stop])[None] for x, stop in zip(ids, stops, strict=True)]


def tokenized(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    return np.array(found["offset_mapping"]), np.array(found["special_tokens_mask"])


def prose() -> list[str]:
    """English: the language reference that Python carries for help()."""
    return list(pydoc_data.topics.topics.values())


PAIRS = (
    Pair("tekken to 24k of Python, code", "tekken", "python-24k", standard_library),
    Pair("tekken to 24k of German, manuals", "tekken", "german-24k", lambda: man_pages("de")),
    Pair("mistral v3 to 24k of Russian, manuals", "sentencepiece-bpe", "russian-24k", lambda: man_pages("ru")),
    Pair("mistral v3 to tekken, English", "sentencepiece-bpe", "tekken", prose, trained=False),
)


# The report

LENGTH = 4096
WIDTHS = ((16, 16), (16, 32), (32, 16), (32, 32), (64, 64))
LOSSES = (("aim", "mse"), ("aim", "cosine"), ("aim_star", "mse"))
HEADER = """# Cost of the kernels: modelled, not measured

Written by `make cost-model`. **No number below is a measurement**: all follow from the loops of the kernels, the tile
shapes of `matt_kernels/configs.py`, plans of real text under real tokenizers, and the peaks that makers state. No
kernel reaches those, ours (small tiles, chains of dependent products) less than flash attention: a ratio says what
shapes and passes cost, it is no forecast.

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


def waste_table(texts, head_dim: int, gpu: Gpu) -> str:
    rows = []
    for name, segments in texts.items():
        for variant, metric in LOSSES:
            cells = []
            for widths in WIDTHS:
                case = case_of(plan_of(segments, widths), Shape(head_dim=head_dim), metric, gpu.target)
                cells.append(f"{waste(kernels(case, variant, metric)):.2f}")
            rows.append([name, variant, metric, *cells])
    return table(["pair", "variant", "metric", *(f"{x} x {y}" for x, y in WIDTHS)], rows)


def ratio_table(segments, widths: tuple[int, int] | None) -> str:
    """`widths` None: those that configs.py has."""
    rows = []
    for head_dim in (64, 128, 256):
        for variant, metric in LOSSES:
            cells = []
            for gpu in GPUS:
                config = choose_config(head_dim, head_dim, torch.bfloat16, metric, gpu.target)
                plan = plan_of(segments, widths or config.widths_for(*(x.shape[1] for x in segments)))
                cells.append(f"{ratio_to_flash(plan, Shape(head_dim=head_dim), gpu, variant, metric):.2f}")
            rows.append([head_dim, variant, metric, *cells])
    return table(["head_dim", "variant", "metric", *(x.name for x in GPUS)], rows)


def kernel_table(segments, shape: Shape, variant: str, metric: str, gpu: Gpu) -> str:
    config = choose_config(shape.head_dim, shape.head_dim, DTYPES[shape.dtype], metric, gpu.target)
    case = case_of(plan_of(segments, config.widths, variant), shape, metric, gpu.target)
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
            config = choose_config(shape.head_dim, shape.head_dim, DTYPES[shape.dtype], metric, gpu.target)
            plan = plan_of(segments, config.widths, variant)
            costs = kernels(case_of(plan, shape, metric, gpu.target), variant, metric)
            ratio = ratio_to_flash(plan, shape, gpu, variant, metric)
            rows.append(
                [length, variant, metric, f"{waste(costs):.2f}", f"{total(costs, gpu) * 1e6:.0f}", f"{ratio:.2f}"]
            )
    return table(["student tokens", "variant", "metric", "issued / useful", "µs floor", "over flash"], rows)


UPDATE_BYTES = 28  # of a row's element by adamw_rows_kernel: reads row, gradient and both moments, writes all but one


class Moved(TorchDispatchMode):
    """Counts the operations inside it that move data, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            given = arguments[1:] if "index_put" in function.name() else arguments  # which overwrites its first
            read = {id(x): x for x in tree_leaves((given, options))}.values()
            tensors = [x for x in (*read, *tree_leaves(result)) if isinstance(x, torch.Tensor)]
            self.operations += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def update_cost(rows: int, hidden: int) -> tuple[int, int]:
    """Operations and bytes of a lazy update by torch operations, of a table that has no more rows than the step."""
    table, gradient = (torch.empty(rows, hidden, device="meta") for _ in range(2))
    side = RowAdamW(table, 0.1, backend="torch")
    with Moved() as moved:
        side.step(torch.empty(rows, dtype=torch.int64, device="meta"), gradient)
    return moved.operations, moved.bytes


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
            waste_table(texts, head_dim, by_name["H100 SXM"]),
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
    Path(__file__).with_name("COST.md").write_text(report())
    print("benchmarks/COST.md")
