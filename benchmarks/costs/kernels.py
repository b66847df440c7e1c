"""What each turn of each kernel multiplies and moves, and the same for flash attention."""

from dataclasses import dataclass

import numpy as np
from costs.geometry import Geometry
from costs.gpus import DTYPES, Cost, Gpu, Product, Shape
from matt_kernels import AimPlan
from matt_kernels.configs import Config, Problem, choose_config


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
        return 8 if self.shape.dtype == "fp32" else 4

    @property
    def other_tiles(self) -> str:
        """What the kernel report adds to the name of a kernel for lopsided texts."""
        return " {}x{}".format(*self.widths) if self.widths[0] > self.widths[1] else ""

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


def config_of(shape: Shape, metric: str, target: str, *, lopsided: bool) -> Config:
    return choose_config(Problem(shape.head_dim, shape.head_dim, DTYPES[shape.dtype], metric, target, lopsided))


def case_of(plan: AimPlan, shape: Shape, metric: str, target: str) -> Case:
    """As the launchers choose it; the tiles are the plan's."""
    config = config_of(shape, metric, target, lopsided=plan.widths[0] > plan.widths[1])
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


def factors(case: Case) -> Cost:
    """Made forward and kept for backward."""
    teacher, student = case.widths
    geometry, dim, block_v = case.geometry, case.shape.head_dim, case.config.block_v
    padded, tiles = -(-dim // block_v) * block_v, geometry.tile_count()
    across, low = teacher * student * padded, case.low
    grams = student * student * padded + (3 + low) * across + (2 + low) * (1 + low) * across
    mixtures = (3 + low) * teacher * student * student
    remainders = (1 + low) * across + teacher * teacher * padded
    product = geometry.segment_products
    useful = product(0, 2) * dim + 5 * product(1, 1) * dim + 3 * product(1, 2)
    useful += (product(1, 1) + product(2, 0)) * dim
    tokens = geometry.batch * np.array(geometry.lengths)
    written = tokens @ [student * (1 + low) + teacher, student] * case.factor_size
    read = tokens.sum() * dim * case.shape.size  # later passes over a tile's values find them in the cache
    return case.cost(
        "factors",
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
        kernel=f"aim_rows {metric}{case.other_tiles}",
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
        kernel=f"aim_columns {metric}{case.other_tiles}",
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
        kernel=f"attend_columns star{case.other_tiles}",
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
        costs = [softmax(case, 0), softmax(case, 1), factors(case), aim_rows(case, metric), aim_columns(case, metric)]
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


def ratio_to_flash(plan: AimPlan, shape: Shape, gpu: Gpu, variant: str, metric: str) -> float:
    case = case_of(plan, shape, metric, gpu.target)
    return total(kernels(case, variant, metric), gpu) / total(flash(case), gpu)
