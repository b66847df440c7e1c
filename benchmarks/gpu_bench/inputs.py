"""What is compared and timed: a shape, segments of real text, tensors of chance."""

from dataclasses import dataclass

import numpy as np
import torch

# Tokens of 500 consecutive segments of German text: tekken, and a new tokenizer of 24k (see costs/texts.py).
TEACHER_SIZES = (
    "1121111112211111112111111111111111211111111121111111111111211111111111111111111111411111111111111111"
    "1111121111111111312115112122211151111111111111111111122111111221221111311121131111211111331111111221"
    "1121113111211111221111121111122112111211111112211131611111115111311231611212211111111151111512111121"
    "1112111111222212112121111121111221131122213111211111121211111211122113114122211121111115121312111112"
    "2112211212113151111111121221111113121111121311111212111113222212121112111211111112111121112111211111"
)
STUDENT_SIZES = (
    "1111111111111111111121111111111111111121111111111111111111121111111111111111111111111111111111121111"
    "1122111111111211211111122111111111111111112111111111111111112121121111111111111111111111111211111222"
    "1111111111211142222111121114211111111211111112111111111111111212111111111111211111111112121111111111"
    "2111111111111211112111111111111111111111111111111112121111111211111111111111111111111211111111111111"
    "1111111121111111111111111111111111111111111111111121111111111111111111111121111111221111111112111111"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    length: int  # student tokens
    head_dim: int
    heads: int
    kv_heads: int
    dtype: str
    variant: str
    metric: str

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return f"n={self.length} d={self.head_dim} {self.dtype} {self.variant} {self.metric}"


def segments_of(shape: Shape, noise: float | None, most: int | None = None) -> list[torch.Tensor]:
    """Ids [1, n] of real segments, repeated; one special token in front. With noise both sides are the student's.
    `most`: without segments of more tokens on some side."""
    sizes = zip(map(int, TEACHER_SIZES), map(int, STUDENT_SIZES), strict=True)
    teacher, student = zip(*(x for x in sizes if most is None or max(x) <= most), strict=True)
    times = -(-shape.length // sum(student))
    teacher, student = np.array(teacher * times), np.array(student * times)
    count = int(np.searchsorted(np.cumsum(student), shape.length - 1, side="right"))
    sides = (student if noise else teacher)[:count], student[:count]
    ids = [np.concatenate([[-100], np.repeat(np.arange(count), x)]) for x in sides]
    return [torch.as_tensor(x)[None] for x in ids]


def make_inputs(shape: Shape, noise: float | None, device: str, seed: int = 0, most: int | None = None):
    """(teacher, student, teacher ids, student ids), ids on the CPU; the same for the same seed. `most` as segments_of
    has it."""
    segments = segments_of(shape, noise, most)
    generator = torch.Generator(device).manual_seed(seed)
    sizes = shape.heads, shape.kv_heads, shape.kv_heads

    def draw(length):
        return [torch.randn(1, x, length, shape.head_dim, generator=generator, device=device) for x in sizes]

    teacher, student = (draw(x.shape[1]) for x in segments)
    if noise:
        student = [torch.add(x, y, alpha=noise) for x, y in zip(teacher, student, strict=True)]
    return *(tuple(x.to(DTYPES[shape.dtype]) for x in side) for side in (teacher, student)), *segments


def pair_count(shape: Shape, segments: torch.Tensor) -> int:
    count = int(segments.max()) + 1
    pairs = count if shape.variant == "aim_star" else count * (count + 1) // 2
    return pairs * shape.heads * (shape.head_dim if shape.metric == "mse" else 1)
