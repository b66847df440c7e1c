"""Where documents and segments lie in a batch: read from the ids, checked, and handed to every engine as plain numbers.

All of it is integer work on the CPU. Ids that live on an accelerator are copied here once per call; ids kept on the
CPU, where the data workers make them, cost no synchronisation.
"""

from dataclasses import dataclass

import numpy as np
import torch

from matt_fast.support.ids import PADDING, SPECIAL


@dataclass(frozen=True)
class Side:
    """One document on one side: tokens [start, stop) of its row, all other positions relative to start."""

    start: int
    stop: int
    segments: np.ndarray  # [stop - start], 0..m-1 within the document, negative for special tokens
    first: np.ndarray  # [m] position of the first token of each segment
    last: np.ndarray  # [m] position of the last token of each segment


@dataclass(frozen=True)
class Document:
    row: int
    teacher: Side
    student: Side

    @property
    def segment_count(self) -> int:
        return len(self.teacher.last)


def find_documents(
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
    teacher_documents: torch.Tensor | None = None,
    student_documents: torch.Tensor | None = None,
) -> list[Document]:
    """Every document of the batch that has at least one segment, in order. ValueError where the ids break the rules."""
    teacher_rows = _rows("teacher", teacher_segments, teacher_documents)
    student_rows = _rows("student", student_segments, student_documents)
    found = []
    for row, (teacher, student) in enumerate(zip(teacher_rows, student_rows, strict=True)):
        if list(teacher) != list(student):
            raise ValueError(
                f"teacher_documents and student_documents must hold the same ids in the same order; row {row} has "
                f"{_shorten(list(teacher))} and {_shorten(list(student))}"
            )
        for name in teacher:
            counts = len(teacher[name].last), len(student[name].last)
            if counts[0] != counts[1]:
                raise ValueError(
                    "teacher_segments and student_segments must have the same number of segments in every document; "
                    f"row {row}, document {name} has {counts[0]} and {counts[1]}"
                )
            if counts[0]:
                found.append(Document(row, teacher[name], student[name]))
    return found


def _rows(side: str, segments: torch.Tensor, documents: torch.Tensor | None) -> list[dict[int, Side]]:
    segments = segments.detach().cpu().numpy().astype(np.int64)
    documents = np.zeros_like(segments) if documents is None else documents.detach().cpu().numpy().astype(np.int64)
    return [_read_row(side, row, *ids) for row, ids in enumerate(zip(segments, documents, strict=True))]


def _read_row(side: str, row: int, segments: np.ndarray, documents: np.ndarray) -> dict[int, Side]:
    _check_segments(f"{side}_segments", row, segments)
    if (documents < PADDING).any():
        raise ValueError(f"{side}_documents must be 0 or above, or -1 for padding; row {row} has {documents.min()}")
    if (segments[documents == PADDING] != SPECIAL).any():
        raise ValueError(f"{side}_segments must be -100 where {side}_documents is -1 (padding); row {row} is not")
    found: dict[int, Side] = {}
    cuts = np.flatnonzero(np.diff(documents)) + 1
    next_segment = 0
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(documents)], strict=True):
        if start == stop or documents[start] == PADDING:
            continue
        name = int(documents[start])
        if name in found:
            raise ValueError(
                f"{side}_documents must be contiguous; row {row} returns to document {name} at token {start}"
            )
        found[name] = _read_document(side, row, start, segments[start:stop], next_segment)
        next_segment += len(found[name].last)
    return found


def _read_document(side: str, row: int, start: int, segments: np.ndarray, base: int) -> Side:
    tokens = np.flatnonzero(segments != SPECIAL)
    ids = segments[tokens]
    if len(ids) and ids[0] != base:
        raise ValueError(f"{side}_segments: no segment may lie in two documents; row {row} has segment {ids[0]} in two")
    changes = np.flatnonzero(np.diff(ids))
    ends = np.append(changes, len(ids) - 1) if len(ids) else changes
    return Side(
        start=start,
        stop=start + len(segments),
        segments=np.where(segments == SPECIAL, SPECIAL, segments - base),
        first=tokens[np.append(0, changes + 1)] if len(ids) else tokens,
        last=tokens[ends],
    )


def _check_segments(name: str, row: int, segments: np.ndarray) -> None:
    ids = segments[segments != SPECIAL]
    wanted = f"{name} must be 0..m-1 in order in every row, -100 for special tokens and padding"
    if (ids < 0).any():
        raise ValueError(f"{wanted}; row {row} has {ids.min()}")
    if not len(ids):
        return
    steps = np.diff(ids, prepend=-1)
    if steps[0] != 1:
        raise ValueError(f"{wanted}; row {row} starts with {ids[0]}")
    if ((steps != 0) & (steps != 1)).any():
        wrong = int(np.flatnonzero((steps != 0) & (steps != 1))[0])
        raise ValueError(f"{wanted}; row {row} goes from {ids[wrong - 1]} to {ids[wrong]}")


def _shorten(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:8]))}, ... {len(ids)} in all]"
