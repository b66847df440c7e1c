"""Chunks of documents as the tensors of a training step: one to a row, or several packed into each.

Everything that the integers of a batch decide is worked out here, in the data worker: nothing is left to the step.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from matt_fast.alignment.segments import SPECIAL

PADDING = -1
OPEN_ROWS = 16  # rows that packing fills at a time; more gain under half a percent


@dataclass(frozen=True)
class Chunk:
    """A stretch of one document under both tokenizers. All arrays are int64, [n_teacher] or [n_student].

    `piece` is the number of the text that it was cut from, among those that its maker read.
    """

    teacher_ids: NDArray[np.int64]
    student_ids: NDArray[np.int64]
    teacher_segments: NDArray[np.int64]
    student_segments: NDArray[np.int64]
    piece: int = 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[2]: teacher and student tokens."""
        return np.array([len(self.teacher_ids), len(self.student_ids)])

    @property
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        return self.teacher_ids, self.student_ids, self.teacher_segments, self.student_segments


@dataclass(frozen=True)
class Position:
    """Where an endless stream of chunks stands; together with the stream's arguments it decides all that follows.

    Attributes:
        epoch: the pass over the data, from 0.
        piece, chunk: the text in this process's share of the pass, and how many chunks of it are behind.
        open_shapes: [chunks, 3] int32: of the chunks in rows that packing is filling: row, teacher and student tokens.
        open_numbers: [numbers] int32: their four arrays, one chunk after the other.
    """

    epoch: int = 0
    piece: int = 0
    chunk: int = 0
    open_shapes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 3), np.int32))
    open_numbers: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def with_open_rows(self, rows: list[list[Chunk]]) -> "Position":
        """This position, with rows that packing is filling."""
        placed = [(number, chunk) for number, row in enumerate(rows) for chunk in row]
        shapes = [(number, *chunk.lengths) for number, chunk in placed]
        parts = [part for _, chunk in placed for part in chunk.arrays]
        return replace(
            self,
            open_shapes=np.array(shapes, np.int32).reshape(-1, 3),
            open_numbers=np.concatenate([*parts, np.empty(0)]).astype(np.int32),
        )

    def open_rows(self) -> list[list[Chunk]]:
        """The rows that packing is filling."""
        rows: dict[int, list[Chunk]] = {}
        numbers, start = self.open_numbers.astype(np.int64), 0
        for row, teacher, student in self.open_shapes.tolist():
            ends = start + np.cumsum([teacher, student, teacher, student])
            rows.setdefault(row, []).append(Chunk(*np.split(numbers[start : ends[-1]], ends[:-1] - start)))
            start = ends[-1]
        return list(rows.values())


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
    position: Position = field(default_factory=Position)  # where the stream stands behind this batch

    @property
    def padding(self) -> tuple[int, int]:
        """(tokens of padding, all tokens), of both sides together."""
        sides = self.teacher_documents, self.student_documents
        return sum(int((x == PADDING).sum()) for x in sides), sum(x.numel() for x in sides)

    def to(self, device: torch.device) -> "Batch":
        """The batch with ids, places and plans on `device`. Segments and documents stay: they are read on the CPU."""

        def moved(part, names):
            return replace(part, **{name: getattr(part, name).to(device, non_blocking=True) for name in names})

        places = moved(self.places, [x.name for x in fields(self.places)])
        plans = {name: plan.to(device, non_blocking=True) for name, plan in self.plans.items()}
        return replace(moved(self, ("teacher_ids", "student_ids", "distinct_ids")), places=places, plans=plans)


class Packer:
    """Puts chunks together into rows, each into the first open row with room for it on both sides.

    Args:
        limits: teacher and student tokens of a row, at most.
        open_rows: rows being filled at a time.
        rows: those that are being filled already.
    """

    def __init__(self, limits: tuple[int, int], open_rows: int = OPEN_ROWS, rows: Iterable[list[Chunk]] = ()):
        self.limits, self.open_rows = np.array(limits), open_rows
        self.rows = list(rows)
        used = [sum(chunk.lengths for chunk in row) for row in self.rows]
        self.room = self.limits - np.array(used, np.int64).reshape(-1, 2)  # of each row, on each side

    def add(self, chunk: Chunk) -> list[Chunk] | None:
        """Place a chunk, which is within the limits; the fullest row is handed out where none has room for it."""
        closed = None
        fits = np.flatnonzero((self.room >= chunk.lengths).all(1))
        if len(fits):
            row = int(fits[0])
        else:
            if len(self.rows) == self.open_rows:
                fullest = int(self.room.min(1).argmin())
                closed = self.rows.pop(fullest)
                self.room = np.delete(self.room, fullest, axis=0)
            row = len(self.rows)
            self.rows.append([])
            self.room = np.vstack([self.room, self.limits])
        self.rows[row].append(chunk)
        self.room[row] -= chunk.lengths
        return closed


def pack(chunks: Iterable[Chunk], limits: tuple[int, int], open_rows: int = OPEN_ROWS) -> Iterator[list[Chunk]]:
    """Put chunks together into rows, see `Packer`; those that are open at the end come last."""
    packer = Packer(limits, open_rows)
    for chunk in chunks:
        if (row := packer.add(chunk)) is not None:
            yield row
    yield from packer.rows


def collate(rows: list[list[Chunk]], skipped: Counter, multiple_of: int = 1) -> Batch:
    """Rows of chunks as one batch, padded on the right to the longest row, or to the next multiple of a number.

    Raises:
        ValueError: the two sides of a chunk do not have the same segments, in the same order.
    """
    for number, row in enumerate(rows):
        for chunk in row:
            _check_same_segments(chunk, number)
    teacher = _side([[(chunk.teacher_ids, chunk.teacher_segments) for chunk in row] for row in rows], multiple_of)
    student = _side([[(chunk.student_ids, chunk.student_segments) for chunk in row] for row in rows], multiple_of)
    return Batch(
        teacher_ids=teacher[0],
        student_ids=student[0],
        teacher_segments=teacher[1],
        student_segments=student[1],
        teacher_documents=teacher[2],
        student_documents=student[2],
        places=_places(*teacher[1:], *student[1:]),
        distinct_ids=student[0].unique(),
        packed=any(len(row) > 1 for row in rows),
        tokens=int((student[2] != PADDING).sum()),
        skipped=skipped,
    )


def _check_same_segments(chunk: Chunk, row: int) -> None:
    in_order = []
    for part in (chunk.teacher_segments, chunk.student_segments):
        inside = part[part >= 0]
        in_order.append(inside[np.diff(inside, prepend=PADDING) != 0])
    if not np.array_equal(*in_order):
        counts = [len(set(x.tolist())) for x in in_order]
        raise ValueError(
            f"chunks: wanted the same segments in the same order on both sides of row {row}, got {counts[0]} on the "
            f"teacher's and {counts[1]} on the student's, or in another order"
        )


def _side(rows: list[list[tuple[NDArray, NDArray]]], multiple_of: int) -> list[torch.Tensor]:
    """Ids, segments and documents of one side, [B, n] each."""
    ids, segments, documents = [], [], []
    for row in rows:
        base = 0
        ids.append(np.concatenate([part for part, _ in row]))
        documents.append(np.repeat(np.arange(len(row)), [len(part) for part, _ in row]))
        segments.append([])
        for _, part in row:
            segments[-1].append(np.where(part >= 0, part + base, SPECIAL))
            base += part.max(initial=-1) + 1
    segments = [np.concatenate(parts) for parts in segments]
    filler = int(ids[0][0])  # any id that occurs: nothing sees padding, and no new row is touched
    padded = []
    for parts, value in ((ids, filler), (segments, SPECIAL), (documents, PADDING)):
        whole = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in parts], True, value)
        padded.append(torch.nn.functional.pad(whole, (0, -whole.shape[1] % multiple_of), value=value))
    return padded


def _places(teacher_segments, teacher_documents, student_segments, student_documents) -> Places:
    segments = teacher_segments, student_segments
    ends = [_flat((x >= 0) & (x != torch.nn.functional.pad(x[:, 1:], (0, 1), value=SPECIAL))) for x in segments]
    begins = [(x >= 0) & (x != torch.nn.functional.pad(x[:, :-1], (1, 0), value=SPECIAL)) for x in segments]
    first = [_flat(x) for x in begins]
    behind = [  # for each segment, whether its document has something before it
        _behind(documents)[place]
        for documents, place in zip((teacher_documents, student_documents), first, strict=True)
    ]
    followed = torch.zeros_like(student_documents, dtype=torch.bool)
    followed[:, :-1] = (student_documents[:, 1:] == student_documents[:, :-1]) & (student_documents[:, 1:] != PADDING)
    both = behind[0] & behind[1]
    scored = [part for x, begin in zip(segments, begins, strict=True) for part in _scored(x, begin, both)]
    before, student_first = first[0][behind[0]] - 1, first[1][behind[0]]
    return Places(*ends, before, student_first, _flat(followed), *scored, ends[1][both])


def _behind(documents: torch.Tensor) -> torch.Tensor:
    """[B * n] bool: whether a token has another one of its document before it."""
    behind = torch.zeros_like(documents, dtype=torch.bool)
    behind[:, 1:] = documents[:, 1:] == documents[:, :-1]
    return behind.flatten()


def _scored(segments: torch.Tensor, begins: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the segments that are wanted ([segments of the batch] bool), and the number of theirs for each."""
    places = _flat(segments >= 0)
    numbers = (begins.flatten().cumsum(0) - 1)[places]
    kept = wanted[numbers]
    return places[kept], (wanted.cumsum(0) - 1)[numbers[kept]]


def _flat(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().flatten()
