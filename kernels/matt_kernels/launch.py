"""Arguments that several launchers pass alike."""

import triton

LOG2_E = 1.4426950408889634


def row_grid(plan, student, config) -> tuple[int, int]:
    """One program per block of rows and head."""
    batch, heads = student[0].shape[:2]
    return triton.cdiv(plan.rows.shape[-1], config.block_m), batch * heads


def strides(*tensors) -> list[int]:
    """Those of batch, head and token; the last one is 1."""
    return [x for tensor in tensors for x in tensor.stride()[:3]]


def sizes(plan, teacher, student) -> tuple[int, ...]:
    batch, heads = student[0].shape[:2]
    lengths = teacher[0].shape[2], student[0].shape[2]
    row_limit = plan.rows.shape[-1]
    return heads, heads // student[1].shape[1], batch * heads * row_limit, row_limit, plan.tiles.shape[-1], *lengths


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(factor on q·k, factor after tanh) such that scores come out in base 2."""
    return (scale * LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def row_options(config, student, plan, softcap) -> dict:
    """Constants of every kernel that walks rows and tiles."""
    return {
        "SOFTCAP": softcap is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_T": plan.widths[0],
        "BLOCK_S": plan.widths[1],
        "HEAD_DIM": student[0].shape[-1],
        "BLOCK_D": config.block_d,
        "SCORE_PRECISION": config.score_precision,
        "PRECISION": config.product_precision,
    }
