"""What work costs on a GPU at its peak: products, exponentials, bytes."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch


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
WARPS = 64  # that a multiprocessor of the A100 and the H100 holds
# Cycles of two loads, one behind the other, that the second level's cache has: bounds of a tile, then its tokens.
WAIT = 600
# Assumed of flash attention 2, forward and backward, causal, 4,096 tokens: share of the peak at heads of 64 and of
# 128 numbers.
FLASH = {"A100 SXM": (0.52, 0.60), "H100 SXM": (0.26, 0.33)}
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

    def row(self, gpu: Gpu, shape: Shape) -> dict | None:
        """Of the kernel report."""
        name = f"{self.kernel} {LONG_NAMES[shape.dtype]} d={shape.head_dim} {gpu.target.replace('cuda:', 'sm_')}"
        return compiled().get(name)

    def compiled_seconds(self, gpu: Gpu, shape: Shape) -> dict[str, float]:
        """What the main loop as compiled needs beside; nothing where it was not read (AMD, flash attention)."""
        row = self.row(gpu, shape)
        if row is None or row["loop"] is None:
            return {}
        cycles = self.turns * row["warps"] / (gpu.processors * gpu.gigahertz * 1e9)
        loop = row["loop"]
        moved = loop["shared_bytes"] + loop.get("tensor_bytes", 0)  # rows of before this was read lack it
        return {"issue": cycles * loop["instructions"] / 4, "shared": cycles * moved / 128}

    def expected(self, gpu: Gpu, shape: Shape) -> tuple[float, float]:
        """Seconds from and to. The steps of a turn never overlap, as Triton compiles them (each product is waited for):
        products, instructions, bytes to and from shared memory, loads that nothing fetches ahead. From: the programs on
        one multiprocessor overlap perfectly. To: not at all, and each scheduler issues every second cycle."""
        seconds, row = self.seconds(gpu), self.row(gpu, shape)
        if row is None or row["loop"] is None:
            return self.floor(gpu), self.floor(gpu)
        if "occupancy" not in row:
            raise LookupError(f"{row['name']}: kernels.json has no occupancy; run make kernel-report")
        loop, found = row["loop"], self.compiled_seconds(gpu, shape)
        cycle = 1 / (gpu.processors * gpu.gigahertz * 1e9)
        read, moved = (self.turns * row["warps"] * loop[x] / 128 * cycle for x in ("tensor_bytes", "shared_bytes"))
        rest = max(seconds["products"], read) + moved + self.turns * WAIT * cycle * (loop["copies"] == 0)
        once, twice = (max(x * found["issue"], seconds["exponentials"]) for x in (1, 2))
        programs = max(1, round(row["occupancy"] * WARPS / row["warps"]))
        floor = max(self.floor(gpu), *found.values())
        return max(floor, (rest + once) / programs), max(floor, rest + twice)

    def floor(self, gpu: Gpu) -> float:
        return max(self.seconds(gpu).values())

    def binding(self, gpu: Gpu, shape: Shape | None = None) -> str:
        seconds = self.seconds(gpu) | (self.compiled_seconds(gpu, shape) if shape else {})
        return max(seconds, key=seconds.get)


@functools.cache
def compiled() -> dict[str, dict]:
    """Rows of the kernel report by name."""
    return {x["name"]: x for x in json.loads(Path(__file__).parents[1].joinpath("kernels.json").read_text())}
