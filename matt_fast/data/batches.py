"""Chunks of documents as the tensors of a training step: one to a row, or several packed into each.

Everything that the integers of a batch decide is worked out here, in the data worker: nothing is left to the step.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from matt_fast.data.packing import Chunk
from matt_fast.data.positions import Position
from matt_fast.support.ids import PADDING, SPECIAL


@dataclass(frozen=True)
class Places:
    """Where the losses look, as int64 indices into the flattened [B * n] tokens of a side.

    Attributes:
        teacher_ends, student_ends: the last token of each segment.
        teacher_before, student_first: for each segment with something before it in its document, the teacher's token
            before it and the student's first token of it.
        predicting: the student's tokens that another one of the same document follows.
        teacher_scored, student_scored: the tokens of segments that stand behind something on both sides.
        teacher_scored_in, student_scored_in: which of these segments each of them is in, counted from 0.
        scored_ends: the student's last token of each of these segments.
    """

    teacher_ends: torch.Tensor
    student_ends: torch.Tensor
    teacher_before: torch.Tensor
    student_first: torch.Tensor
    predicting: torch.Tensor
    teacher_scored: torch.Tensor
    teacher_scored_in: torch.Tensor
    student_scored: torch.Tensor
    student_scored_in: torch.Tensor
    scored_ends: torch.Tensor


@dataclass(frozen=True)
class Continued:
    """E places where one side has read some pieces of a token of the other side, and what may come there.

    That side tells what the next piece is, the other one which of the tokens that begin with these pieces it is. Tokens
    are in groups: those that have a next piece in common, and, where there are any, those that end here.

    Attributes (int64; places are indices into the flattened [B * n] tokens of a side):
        token_at: [E], the last token before the token, on its side.
        piece_at: [E], the last of the pieces that were read, on the other side.
        tokens: [U], the distinct tokens.
        token, token_entry, token_group: [P], each token that may come at a place: which of `tokens`, at which of the E
            places, in which group.
        pieces: [V], the distinct next pieces.
        piece, piece_entry: [G], each piece that may come at a place: which of `pieces`, at which place. The number of
            its group is its own index.
        stops: [S], the places with tokens that end there. Their groups come behind the G others.
    """

    token_at: torch.Tensor
    piece_at: torch.Tensor
    tokens: torch.Tensor
    token: torch.Tensor
    token_entry: torch.Tensor
    token_group: torch.Tensor
    pieces: torch.Tensor
    piece: torch.Tensor
    piece_entry: torch.Tensor
    stops: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of chunks as rectangular int64 tensors, [B, n] padded on the right.

    Each chunk is a document of its own in its row, numbered from 0; padding is document -1 and, like special tokens,
    segment -100. Segment ids run on through a row.
    """

    teacher_ids: torch.Tensor
    student_ids: torch.Tensor
    teacher_segments: torch.Tensor
    student_segments: torch.Tensor
    teacher_documents: torch.Tensor
    student_documents: torch.Tensor
    places: Places
    distinct_ids: torch.Tensor  # [u] int64, the student ids that occur, ascending
    packed: bool  # whether a row holds more than one document
    tokens: int  # student tokens without padding
    skipped: Counter  # what was left out on the way to this batch, by reason
    plans: dict = field(default_factory=dict)  # what `aim_loss` takes as `plan`, by variant and sliding window
    continuations: tuple[Continued, Continued] | None = None  # of student tokens, of teacher tokens
    position: Position = field(default_factory=Position)  # where the stream stands behind this batch

    @property
    def padding(self) -> tuple[int, int]:
        """(tokens of padding, all tokens), of both sides together."""
        sides = self.teacher_documents, self.student_documents
        return sum(int((x == PADDING).sum()) for x in sides), sum(x.numel() for x in sides)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, but for segments and documents, which are read on the CPU."""
        return self._with(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with what `to` moves in pinned memory, from which a GPU copies while the CPU goes on."""
        return self._with(lambda part: part.pin_memory())

    def _with(self, change: Callable) -> "Batch":
        def changed(part, names):
            return replace(part, **{name: change(getattr(part, name)) for name in names})

        def all_of(part):
            return changed(part, [x.name for x in fields(part)])

        continuations = self.continuations and tuple(map(all_of, self.continuations))
        plans = {name: change(plan) for name, plan in self.plans.items()}
        moved = changed(self, ("teacher_ids", "student_ids", "distinct_ids"))
        return replace(moved, places=all_of(self.places), plans=plans, continuations=continuations)


def collate(rows: list[list[Chunk]], skipped: Counter, multiple_of: int = 1) -> Batch:
    """Rows of chunks as one batch, padded on the right to the longest row, or to the next multiple of a number.

    Raises:
        ValueError: the two sides of a chunk do not have the same segments, in the same order.
    """
    chunks = [chunk for row in rows for chunk in row]
    per_row = [len(row) for row in rows]
    teacher = _Side([(chunk.teacher_ids, chunk.teacher_segments) for chunk in chunks], per_row, multiple_of)
    student = _Side([(chunk.student_ids, chunk.student_segments) for chunk in chunks], per_row, multiple_of)
    if not all(map(np.array_equal, teacher.in_order(), student.in_order())):
        _refuse(rows)
    teacher_ids, teacher_segments, teacher_documents = teacher.rectangles()
    student_ids, student_segments, student_documents = student.rectangles()
    return Batch(
        teacher_ids=teacher_ids,
        student_ids=student_ids,
        teacher_segments=teacher_segments,
        student_segments=student_segments,
        teacher_documents=teacher_documents,
        student_documents=student_documents,
        places=_places(teacher, student),
        distinct_ids=torch.from_numpy(np.unique(student.ids)),
        packed=any(count > 1 for count in per_row),
        tokens=len(student.ids),
        skipped=skipped,
    )


class _Side:
    """One side of a batch, its tokens one after the other without padding; all arrays are int64 or bool, [tokens].

    Args:
        parts: ids and segments of each chunk, none of them empty.
        per_row: chunks of each row.
        multiple_of: of the rows' width.
    """

    def __init__(self, parts: list[tuple[NDArray, NDArray]], per_row: list[int], multiple_of: int):
        self.ids = np.concatenate([ids for ids, _ in parts], dtype=np.int64)
        segments = np.concatenate([own for _, own in parts], dtype=np.int64)
        lengths = np.array([len(ids) for ids, _ in parts])
        starts = np.cumsum(lengths) - lengths
        self.chunk = np.repeat(np.arange(len(parts)), lengths)
        self.first, self.last = np.zeros((2, len(self.ids)), bool)  # of their chunk
        self.first[starts] = self.last[starts + lengths - 1] = True

        first_chunk = np.cumsum(per_row) - per_row  # of each row
        self.document = np.repeat(np.arange(len(parts)) - np.repeat(first_chunk, per_row), lengths)
        counts = np.maximum.reduceat(segments, starts).clip(min=-1) + 1
        base = np.cumsum(counts) - counts
        base -= np.repeat(base[first_chunk], per_row)  # segments before each chunk in its row
        self.segments = np.where(segments >= 0, segments + np.repeat(base, lengths), SPECIAL)

        widths = np.add.reduceat(lengths, first_chunk)
        self.shape = len(per_row), int(-(-widths.max() // multiple_of) * multiple_of)
        shift = np.arange(len(per_row)) * self.shape[1] - starts[first_chunk]
        self.at = np.arange(len(self.ids)) + np.repeat(shift, widths)  # place in the flattened rectangle

    def rectangles(self) -> list[torch.Tensor]:
        """Ids, segments and documents, [B, n] each."""
        filler = self.ids[0]  # any id that occurs: nothing sees padding, and no new row is touched
        made = []
        for values, value in ((self.ids, filler), (self.segments, SPECIAL), (self.document, PADDING)):
            whole = np.full(self.shape[0] * self.shape[1], value, np.int64)
            whole[self.at] = values
            made.append(torch.from_numpy(whole.reshape(self.shape)))
        return made

    def in_order(self) -> tuple[NDArray, NDArray]:
        """The segments in the order of their tokens, and the chunks that they are in."""
        inside = self.segments >= 0
        segments, chunks = self.segments[inside], self.chunk[inside]
        new = (np.diff(segments, prepend=PADDING) != 0) | (np.diff(chunks, prepend=PADDING) != 0)
        return segments[new], chunks[new]


def _refuse(rows: list[list[Chunk]]) -> None:
    """Raise a ValueError that names the first row with a chunk whose sides have other segments."""
    for number, row in enumerate(rows):
        for chunk in row:
            in_order = []
            for part in (chunk.teacher_segments, chunk.student_segments):
                inside = part[part >= 0]
                in_order.append(inside[np.diff(inside, prepend=PADDING) != 0])
            if not np.array_equal(*in_order):
                counts = [len(set(x.tolist())) for x in in_order]
                raise ValueError(
                    f"chunks: wanted the same segments in the same order on both sides of row {number}, got "
                    f"{counts[0]} on the teacher's and {counts[1]} on the student's, or in another order"
                )


def _places(teacher: _Side, student: _Side) -> Places:
    begins, ends = [], []
    for side in (teacher, student):
        inside, changes = side.segments >= 0, np.diff(side.segments) != 0
        begins.append(inside & (np.concatenate([[True], changes]) | side.first))
        ends.append(inside & (np.concatenate([changes, [True]]) | side.last))
    has_context = ~teacher.first[begins[0]]  # of each segment: whether its document has something before it
    both = has_context & ~student.first[begins[1]]
    places = (
        teacher.at[ends[0]],
        student.at[ends[1]],
        teacher.at[begins[0]][has_context] - 1,
        student.at[begins[1]][has_context],
        student.at[~student.last],
        *_scored(teacher, begins[0], both),
        *_scored(student, begins[1], both),
        student.at[ends[1]][both],
    )
    return Places(*map(torch.from_numpy, places))


def _scored(side: _Side, begins: NDArray, wanted: NDArray) -> tuple[NDArray, NDArray]:
    """The tokens of the segments that are wanted ([segments of the batch] bool), and the number of theirs for each."""
    inside = side.segments >= 0
    numbers = (np.cumsum(begins) - 1)[inside]
    kept = wanted[numbers]
    return side.at[inside][kept], (np.cumsum(wanted) - 1)[numbers[kept]]
