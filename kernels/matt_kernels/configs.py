"""Every tile shape in one place, chosen by `make kernel-report`: fit and no spills first, then rows per block."""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

# The fewest columns of a float32 product on NVIDIA. Triton 3.6 wants 16, 3.9 takes 8.
NARROWEST = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 16


@dataclass(frozen=True)
class Launch:
    """One kernel's block of rows (and of tokens, where tiles do not say), warps and pipeline stages."""

    block_m: int = 64
    block_n: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Config:
    """Shapes and options of all kernels for one head dimension, dtype and target."""

    widths: tuple[int, int]  # most teacher and student tokens of a tile
    block_d: int  # head dimension of queries and keys, padded
    block_dv: int  # head dimension of values, padded
    block_v: int  # slice of the values that factors and dV work on at a time
    kind: str  # operands of products in loops: "bf16", "tf32" or "fp32"; see attention.operand
    score_precision: str  # input_precision of q·k
    product_precision: str  # of all other products in the loops
    factor_kind: str  # of the operands of products with the factors of a tile
    factor_precision: str
    exact_precision: str  # of what is done once per tile, and for float32 of aim_columns' sums over rows
    softmax: Launch
    factors: Launch
    rows: Launch
    columns: Launch
    long_rows: Launch
    long_columns: Launch
    attend: Launch  # aim_star's o of one side
    attend_distance: Launch
    attend_rows: Launch  # its dQ
    attend_columns: Launch  # its dK and dV


def is_lopsided(teacher_tokens: int, student_tokens: int) -> bool:
    """Whether the teacher has half as many tokens again: narrower tiles for the student leave fewer columns empty."""
    return 2 * teacher_tokens >= 3 * student_tokens


@dataclass(frozen=True)
class Problem:
    """What a config depends on: no length."""

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    metric: str  # "mse" for aim_star, which has no factors
    target: str  # "cuda:90"-like: backend and compute capability, "hip" or "cpu" (the interpreter)
    lopsided: bool = False
    softcap: bool = False


KINDS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "fp32"}


def factor_kind(dtype: torch.dtype, metric: str) -> str:
    """Config.factor_kind: it decides the dtype in which factors are kept."""
    better = {"bf16": "tf32", "tf32": "fp32", "fp32": "fp32"}
    return better[KINDS[dtype]] if metric == "cosine" else KINDS[dtype]


@cache
def choose_config(problem: Problem) -> Config:
    """Precisions, tiles and launches.

    bfloat16 keeps bfloat16 operands, as flash attention does. float16 does not hold the small weights and gradients of
    long rows, so its loops use tf32, which has the same 11 bits. float32 uses three tf32 products. The cosine's norms
    need the next better kind: rounding of a single weight does not average out over a vector as in the plain formula.
    """
    metric, target = problem.metric, problem.target
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (problem.head_dim, problem.value_dim))
    kind = KINDS[problem.dtype]
    exact = "tf32x3" if target.startswith("cuda") else "ieee"
    once = "ieee" if kind == "fp32" else exact  # rounds to nearest; few enough products to do without tensor cores
    half = "tf32" if target.startswith("cuda") else "ieee"
    of_factors = factor_kind(problem.dtype, metric)
    size = max(block_d, block_dv)
    # The three products of tf32x3 do not fit beside each other into the shared memory of these cards at 256.
    small = size > 128 and target in ("cuda:86", "cuda:89", "cuda:120")
    precision = {"bf16": half, "tf32": half, "fp32": "ieee" if small else exact}
    # The cosine has many products with the factors, which wide tiles make deeper.
    widths = (16, 16) if metric == "cosine" or (kind == "fp32" and size > 64) else (32, 32)
    # Others spill in wider tiles for the teacher.
    fits = kind != "fp32" if metric == "mse" else kind == "bf16" and size <= 128
    lopsided = problem.lopsided and fits
    # What needs more registers.
    needs = {"softcap": problem.softcap, "padded": min(problem.head_dim, problem.value_dim) < size or kind != "bf16"}
    return Config(
        widths=(32, 16) if lopsided else widths,
        block_d=block_d,
        block_dv=block_dv,
        # The factors' float32 products fill the registers: with wider slices they spill.
        block_v=NARROWEST if target.startswith("cuda") else min(32, block_dv),
        kind=kind,
        score_precision=precision[kind],
        product_precision=precision[kind],
        factor_kind=of_factors,
        factor_precision=precision[of_factors],
        exact_precision=once,
        **_launches(kind, metric, size, target, lopsided, [x for x, y in needs.items() if y]),
    )


# block_m, block_n, warps, stages of bfloat16 at head dimensions up to 64, 128 and 256. Chosen by the main loops of the
# report: of all that do not spill, the one whose longest part (products, instructions, shared memory) for a score is
# shortest. "90": where a group of four warps multiplies 64 rows at once.
_TABLE = {
    "softmax": ((64, 64, 4, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
    "softmax 90": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    "factors": ((64, 64, 2, 1), (64, 64, 2, 1), (64, 64, 2, 1)),
    "rows": ((64, 64, 4, 2), (32, 64, 2, 2), (16, 64, 2, 2)),
    "rows 90": ((64, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2)),
    "columns": ((32, 64, 2, 2), (16, 64, 2, 2), (32, 64, 4, 1)),
    "columns 90": ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    "cosine rows": ((64, 64, 4, 1), (32, 64, 2, 1), (16, 64, 2, 1)),
    "cosine rows 90": ((64, 64, 4, 1), (128, 64, 8, 1), (16, 64, 2, 1)),
    "cosine columns": ((32, 64, 2, 1), (32, 64, 2, 1), (16, 64, 2, 1)),
    "cosine columns 90": ((64, 64, 4, 1), (64, 64, 4, 1), (16, 64, 2, 1)),
    "lopsided cosine rows": ((64, 64, 4, 1), (16, 64, 2, 1), (16, 64, 2, 1)),
    "lopsided cosine rows 90": ((64, 64, 4, 1), (128, 64, 8, 1), (16, 64, 2, 1)),
    "lopsided cosine columns": ((32, 64, 2, 1), (16, 64, 2, 1), (16, 64, 2, 1)),
    "lopsided cosine columns 90": ((64, 64, 4, 1), (16, 64, 2, 1), (16, 64, 2, 1)),
    "long_rows": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    "long_columns": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "attend": ((64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "attend_distance": ((32, 32, 4, 1), (16, 32, 4, 1), (8, 32, 4, 1)),
    "attend_rows": ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    "attend_columns": ((64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1)),
}
WARP_GROUPS = "cuda:90", "cuda:100"
# What spills on one target only; "padded": only where heads are narrower than their blocks, or not bfloat16.
_EXCEPTIONS = {
    ("cuda:80", "softmax, softcap", 0): (64, 64, 4, 1),
    ("cuda:86", "softmax, softcap", 0): (64, 64, 4, 1),
    ("cuda:86", "softmax", 1): (64, 32, 4, 2),
    ("cuda:86", "columns", 1): (16, 64, 2, 1),
    ("cuda:89", "softmax, softcap", 0): (64, 64, 4, 1),
    ("cuda:89", "softmax", 1): (64, 32, 4, 2),
    ("cuda:89", "columns", 1): (16, 64, 2, 1),
    # Measured on an H200 at 64 and 128 (benchmarks/GPU.md): the fastest, though rows and columns spill a little at 128.
    ("cuda:90", "softmax 90", 0): (64, 64, 4, 3),
    ("cuda:90", "softmax 90", 1): (64, 64, 4, 3),
    ("cuda:90", "softmax 90, padded", 1): (64, 64, 4, 2),
    ("cuda:90", "rows 90", 1): (64, 64, 4, 3),
    ("cuda:90", "rows 90, padded", 1): (128, 64, 8, 2),
    ("cuda:90", "rows 90, softcap", 1): (128, 64, 8, 2),
    ("cuda:90", "columns 90", 0): (64, 64, 4, 3),
    ("cuda:90", "columns 90", 1): (64, 64, 4, 3),
    ("cuda:90", "columns 90, padded", 1): (64, 64, 4, 2),
    ("cuda:90", "columns 90, softcap", 1): (64, 64, 4, 2),
    ("cuda:90", "columns 90, softcap", 2): (32, 64, 4, 1),
    ("cuda:90", "lopsided attend_columns", 0): (128, 64, 8, 2),
    ("cuda:90", "cosine rows 90, padded", 1): (16, 64, 2, 1),
    ("cuda:90", "lopsided cosine rows 90, padded", 1): (16, 64, 2, 1),
    ("cuda:100", "cosine rows 90, softcap", 0): (128, 64, 8, 1),
    ("cuda:100", "lopsided cosine columns 90, softcap", 0): (128, 64, 8, 1),
    ("cuda:100", "columns 90", 1): (64, 64, 8, 1),
    ("cuda:100", "cosine columns 90", 1): (32, 64, 2, 1),
    ("cuda:100", "lopsided cosine rows 90", 1): (16, 64, 2, 1),
    ("cuda:100", "attend", 2): (64, 64, 8, 1),
    ("cuda:120", "rows, softcap", 0): (32, 64, 2, 2),
    ("cuda:120", "lopsided cosine columns, softcap", 0): (16, 64, 2, 1),
    ("cuda:120", "softmax, softcap", 0): (128, 64, 8, 2),
    ("cuda:120", "softmax", 1): (32, 64, 4, 2),
    ("cuda:120", "softmax", 2): (64, 32, 8, 2),
    ("cuda:120", "rows", 1): (16, 64, 2, 2),
    ("cuda:120", "rows", 2): (32, 64, 4, 2),
    ("cuda:120", "attend", 1): (64, 64, 8, 2),
    ("cuda:120", "cosine rows", 1): (16, 64, 2, 1),
    ("cuda:120", "lopsided attend_columns, softcap", 1): (32, 64, 4, 1),
    ("cuda:120", "lopsided columns", 2): (16, 64, 4, 2),
    ("hip", "columns", 2): (16, 64, 4, 1),
    ("hip", "attend_columns", 2): (16, 64, 4, 1),
}


def _launch(name: str, target: str, place: int, needs: list[str]) -> Launch:
    """`name` as in the table; what it has not for lopsided texts is as for others."""
    plain = name if name in _TABLE else name.removeprefix("lopsided ")
    special = (_EXCEPTIONS.get((target, x, place)) for x in (*(f"{name}, {need}" for need in needs), name, plain))
    return Launch(*next(filter(None, special), _TABLE[plain][place]))


def _launches(kind: str, metric: str, size: int, target: str, lopsided: bool, needs: list[str]) -> dict[str, Launch]:
    # Operands of four bytes take the registers of the next size.
    place = min((size > 64) + (size > 128) + (kind != "bf16"), 2)
    loops = "lopsided " * lopsided + "cosine " * (metric == "cosine")
    group = " 90" * (target in WARP_GROUPS)
    names = {x: x for x in _TABLE if x in Config.__dataclass_fields__}
    names["attend_columns"] = "lopsided " * lopsided + "attend_columns"
    names |= {"softmax": f"softmax{group}", "rows": f"{loops}rows{group}", "columns": f"{loops}columns{group}"}
    found = {x: _launch(y, target, place, needs) for x, y in names.items()}
    if kind != "bf16" and size > 128:
        # Twice the operands of bfloat16 again.
        found |= {"attend_rows": Launch(16, 32, 4, 1), "attend_columns": Launch(16, 64, 8, 1)}
    if kind != "bf16":
        found = {x: y if x == "factors" else replace(y, warps=max(y.warps, 4)) for x, y in found.items()}
    if kind == "fp32":
        # Three products each, of operands twice the size: what fits into the shared memory of the smallest cards.
        block = 16 if size > 64 else 32
        found = {x: replace(y, block_m=min(y.block_m, block), block_n=block, stages=1) for x, y in found.items()}
        found["softmax"] = replace(found["softmax"], block_n=32)
        if size > 128:
            found = {x: y if x == "factors" else replace(y, warps=8) for x, y in found.items()}
    if target == "hip":
        # Up to 512 registers with 4 warps, 256 with 8; a second stage copies the loop's body.
        found = {x: replace(y, warps=min(y.warps, 4), stages=1) for x, y in found.items()}
    return found


def row_launch(hidden: int) -> Launch:
    """Of the update of embedding rows, on all targets: no thread without an element of its own, and no spills."""
    return Launch(block_m=1, block_n=min(1024, max(256, triton.next_power_of_2(hidden))), warps=4, stages=1)


OLDEST = 8, 0


def target_of(device: torch.device) -> str:
    """What choose_config calls the device that tensors live on: that of its family.

    Raises:
        ValueError: an NVIDIA GPU older than Ampere.
    """
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "hip"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        wanted, found = (".".join(map(str, x)) for x in (OLDEST, capability))
        raise ValueError(f"the Triton kernels need compute capability {wanted} or newer; got {found} on {device}")
    # Orin has the shared memory of the A100, Thor (11.0) the tensor cores of the B200.
    families = (12, 0, 120), (10, 0, 100), (9, 0, 90), (8, 9, 89), (8, 7, 80), (8, 6, 86), (8, 0, 80)
    return f"cuda:{next(name for *oldest, name in families if capability >= tuple(oldest))}"
