"""FOCUS: a new token's row as a sparse mix of the rows of shared tokens that are used alike.

K. Dobler and G. de Melo, "FOCUS: Effective Embedding Initialization for Monolingual Specialization of Multilingual
Models" (EMNLP 2023, https://arxiv.org/abs/2305.14481). How alike two tokens are used is the cosine of their vectors in
a fastText model of text tokenised with the new tokenizer; sparsemax (Martins and Astudillo 2016,
https://arxiv.org/abs/1602.02068) of the cosines gives the weights. The cosines are computed a block of rows at a time.
"""

from collections.abc import Callable

import torch

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.fasttext import TokenVectors
from matt_fast.initializers.mixtures import Coefficients, Mixtures

FIRST_TOP = 64  # largest scores looked at first; four times as many where the support may reach beyond them
TOP_BYTES = 64  # temporary memory of each of these, float64 sums and masks included


def sparsemax_coefficients(
    targets: torch.Tensor,
    anchors: torch.Tensor,
    *,
    block_bytes: int = 1 << 28,
    on_progress: Callable[[int, int], None] | None = None,
) -> Coefficients:
    """Exact sparsemax, for each target, of its cosines with all anchors. The m x s cosines never exist at once.

    A vector of zeros has no direction: as a target its row is empty, as an anchor it gets no weight. (deepfocus leaves
    such tokens out.) Every other row has positive weights that sum to 1.

    Args:
        targets: [m, a] floating point; the cosines are computed in float32, on the tensors' device.
        anchors: [s, a], likewise.
        block_bytes: bound of the temporary memory beside a normalised copy of the anchors (4 * s * a bytes) and the
            result (12 bytes a non-zero, twice that while its parts are joined); at least one row is taken at a time.
        on_progress: called after each block with the targets done and m.

    Returns:
        Coefficients [m, s].

    Raises:
        ValueError: shapes or devices that do not fit, a value that is not finite, or no anchor with a direction.
        TypeError: tensors that are not floating point.
    """
    for name, tensor in (("targets", targets), ("anchors", anchors)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: wanted floating point, got {tensor.dtype}")
        if tensor.ndim != 2:
            raise ValueError(f"{name}: wanted [tokens, dimensions], got {tuple(tensor.shape)}")
    if targets.shape[1] != anchors.shape[1] or targets.device != anchors.device:
        raise ValueError(
            f"targets, anchors: wanted vectors of one space on one device, got {tuple(targets.shape)} on "
            f"{targets.device} and {tuple(anchors.shape)} on {anchors.device}"
        )
    kept = anchors.any(dim=1).nonzero()[:, 0]
    if len(kept) == 0:
        raise ValueError(f"anchors: wanted a vector other than zero, got none in {tuple(anchors.shape)}")
    directions = _directions(anchors if len(kept) == len(anchors) else anchors[kept], "anchors")
    parts: list[tuple[torch.Tensor, ...]] = []
    done = 0
    # Half of the bound for the scores of a block, half to search them.
    for block in targets.split(max(1, block_bytes // (8 * len(directions)))):
        block = _directions(block, "targets")
        # [b, a] @ [a, s] -> [b, s]
        counts, columns, values = sparsemax(block @ directions.T, room=block_bytes // 2)
        empty = ~block.any(dim=1)
        if empty.any():
            wanted = ~empty.repeat_interleave(counts)
            counts, columns, values = counts.masked_fill(empty, 0), columns[wanted], values[wanted]
        parts.append((counts, kept[columns], values))
        done += len(block)
        if on_progress is not None:
            on_progress(done, len(targets))
    counts, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return Coefficients(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), columns, values)


def sparsemax(scores: torch.Tensor, *, room: int = 1 << 27) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact sparsemax of each row: the point of the probability simplex next to it (Martins and Astudillo 2016).

    Only a row's largest scores are sorted. If the smallest of them gets no weight the rest gets none either; otherwise
    more are looked at.

    Args:
        scores: [b, s], floating point, finite, s >= 1.
        room: bound of the temporary memory in bytes; at least one row is taken at a time.

    Returns:
        (counts [b] int64, columns [non-zeros] int64, values [non-zeros] float32): the weights, row by row.
    """
    n, width = scores.shape
    pending, k = torch.arange(n, device=scores.device), min(FIRST_TOP, width)
    parts = []
    while len(pending):
        unfinished = []
        for rows in pending.split(max(1, room // (scores.element_size() * width + TOP_BYTES * k))):
            top, columns = scores[rows].topk(k, dim=1)
            weights = _weights(top.double())
            done = (weights[:, -1] <= 0) | (k == width)
            inside = (weights > 0) & done[:, None]
            parts.append((rows[:, None].expand_as(columns)[inside], columns[inside], weights[inside].float()))
            unfinished.append(rows[~done])
        pending, k = torch.cat(unfinished), min(4 * k, width)
    if not parts:
        return pending, pending, torch.zeros(0, device=scores.device)
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    order = rows.argsort(stable=True)
    return rows.bincount(minlength=n), columns[order], values[order]


def _weights(top: torch.Tensor) -> torch.Tensor:
    """Sparsemax weights of rows that are sorted by falling score; [b, k] float64."""
    top = top - top[:, :1]  # leaves the weights as they are, and keeps the sums small
    size = torch.arange(1, top.shape[1] + 1, device=top.device)
    thresholds = (top.cumsum(1) - 1) / size
    support = (top > thresholds).sum(1, keepdim=True)
    return (top - thresholds.gather(1, support - 1)).clamp_min(0)


def _directions(vectors: torch.Tensor, name: str) -> torch.Tensor:
    """[n, a] float32 vectors of length 1; zeros stay."""
    vectors = vectors.detach().float()
    largest = torch.linalg.vector_norm(vectors, torch.inf, dim=1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(f"{name}: wanted finite vectors, got NaN or infinity")
    # First by the largest entry: squares of very small or large ones leave the range of float32.
    directions = vectors / largest.masked_fill(largest == 0, 1)
    return directions.div_(torch.linalg.vector_norm(directions, dim=1, keepdim=True).clamp_min(1))


def focus_mixtures(
    vocabulary: VocabularyPair,
    vectors: TokenVectors,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> Mixtures:
    """Sparsemax mixtures of the teacher's rows of shared tokens for the new tokens with a vector.

    New tokens without one (all zeros, or none in `vectors`) are left to the caller; deepfocus draws them at random.

    Args:
        vocabulary: the two vocabularies.
        vectors: of student tokens, from `fasttext_vectors`.
        device: to compute on.
        on_progress: as `sparsemax_coefficients`.

    Raises:
        ValueError: no shared token has a vector, ids of `vectors` beyond the vocabulary, or vectors not finite.
    """
    if len(vectors.ids) and int(vectors.ids.max()) >= vocabulary.rows:
        raise ValueError(
            f"vectors: wanted ids below the {vocabulary.rows} of the vocabulary, got {int(vectors.ids.max())}"
        )
    position = torch.full((vocabulary.rows,), -1)
    position[vectors.ids] = torch.where(vectors.vectors.any(dim=1), torch.arange(len(vectors.ids)), -1)
    new = torch.tensor([i for i in sorted(vocabulary.tokens) if i not in vocabulary.matches], dtype=torch.int64)
    shared = torch.tensor(sorted(vocabulary.matches), dtype=torch.int64)
    ids, anchors = new[position[new] >= 0], shared[position[shared] >= 0]
    if len(anchors) == 0:
        raise ValueError(f"vectors: wanted one for at least one of the {len(shared)} shared tokens, got none")
    targets, known = (vectors.vectors[position[x]].to(device) for x in (ids, anchors))
    found = sparsemax_coefficients(targets, known, on_progress=on_progress)
    teacher_ids = torch.tensor([vocabulary.matches[i].teacher_id for i in anchors.tolist()], device=device)
    return Mixtures(ids, found._replace(col_indices=teacher_ids[found.col_indices]), vectors.counts)
