"""Where in a batch one side has read some pieces of a token of the other side, and what may come there."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from matt_fast.alignment.continuations import NONE, Continuations, Spellings
from matt_fast.data.batches import Batch, Continued
from matt_fast.support.ids import PADDING


def with_continuations(tables: Continuations, batch: Batch) -> Batch:
    """The batch with `Batch.continuations`."""
    teacher = _Side(batch.teacher_ids, batch.teacher_documents, batch.teacher_segments, batch.places.teacher_ends)
    student = _Side(batch.student_ids, batch.student_documents, batch.student_segments, batch.places.student_ends)
    merged = _continued(tables.merged, student, teacher, to_the_end=True)
    split = _continued(tables.split, teacher, student, to_the_end=False)
    return replace(batch, continuations=(merged, split))


class _Side:
    """A side of a batch: its ids and its segments' last tokens, all flat, [B * n]."""

    def __init__(self, ids: torch.Tensor, documents: torch.Tensor, segments: torch.Tensor, ends: torch.Tensor):
        self.ids, self.ends = ids.flatten().numpy(), ends.numpy()
        # Where special tokens stand, and beyond a document, nothing is read.
        self.document = np.where(segments.numpy() < 0, PADDING, documents.numpy())
        rows = np.arange(len(self.document))[:, None] * (self.document.max(initial=0) + 1)
        self.document = np.where(self.document == PADDING, PADDING, self.document + rows).flatten()

    def behind(self, ends: NDArray[np.int64], distance: int) -> NDArray[np.int64]:
        """[n] int64: the ids so far behind the ends ([n]) in the same documents, NONE where there is none."""
        at = np.minimum(ends + distance, len(self.ids) - 1)
        inside = (ends + distance == at) & (self.document[at] == self.document[ends])
        return np.where(inside, self.ids[at], NONE)


def _continued(spellings: Spellings, whole: _Side, parts: _Side, to_the_end: bool) -> Continued:
    """All places where `parts` has read pieces of the token that `whole` has next.

    Args:
        spellings: the tokens of `whole` by those of `parts`.
        to_the_end: whether the place behind the last piece counts too, where other tokens go on from there; tokens that
            end there are then among those that may come.
    """
    token = whole.behind(whole.ends, 1)
    going = np.flatnonzero(token >= 0)
    found = []
    for read in range(1, len(parts.ids) + 1):
        piece = spellings.pieces.item(token[going], read - 1)
        going = going[(piece >= 0) & (piece == parts.behind(parts.ends[going], read))]
        if not len(going):
            break
        node = spellings.nodes.item(token[going], read - 1)
        ended = spellings.pieces.item(token[going], read) == NONE
        kept = (node >= 0) & (to_the_end | ~ended)
        found.append(np.stack([going, np.full(len(going), read), node])[:, kept])
    end, read, node = np.concatenate([np.zeros((3, 0), np.int64), *found], axis=1)
    return _candidates(spellings, whole.ends[end], parts.ends[end] + read, node, to_the_end)


def _candidates(
    spellings: Spellings, token_at: NDArray, piece_at: NDArray, node: NDArray, to_the_end: bool
) -> Continued:
    pieces, piece_entry = spellings.next.take(node)
    tokens, token_entry = spellings.below.take(node)
    of_token, _ = spellings.below_next.take(node)
    counts = np.bincount(piece_entry, minlength=len(node))
    group = of_token + (np.cumsum(counts) - counts)[token_entry]
    stops = np.zeros(0, np.int64)
    if to_the_end:
        ending, ending_entry = spellings.here.take(node)
        stops, number = np.unique(ending_entry, return_inverse=True)
        tokens = np.concatenate([tokens, ending])
        token_entry = np.concatenate([token_entry, ending_entry])
        group = np.concatenate([group, len(pieces) + number])
    columns, token = np.unique(tokens, return_inverse=True)
    piece_columns, piece = np.unique(pieces, return_inverse=True)
    arrays = token_at, piece_at, columns, token, token_entry, group, piece_columns, piece, piece_entry, stops
    return Continued(*(torch.from_numpy(x.astype(np.int64)) for x in arrays))
