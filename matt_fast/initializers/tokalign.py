"""TokAlign: a new token's row is that of the teacher's token which keeps the same company in the same text.

C. Li, J. Zhang and C. Zong, "TokAlign: Efficient Vocabulary Adaptation via Token Alignment" (ACL 2025,
https://arxiv.org/abs/2506.03523). A text is tokenised on both sides; tokens get vectors from what they occur beside;
each vector is told by its cosines with those of tokens that both sides share, which makes the sides comparable; a new
token takes the row of the teacher's token with the nearest. The paper's vectors are GloVe's, trained by a C program
that is on no package index; here GloVe's co-occurrence counts are factorised at once (O. Levy, Y. Goldberg and I.
Dagan, "Improving Distributional Similarity with Lessons Learned from Word Embeddings", TACL 2015).
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import VocabularyPair, check_fast, token_bytes, vocabulary_rows
from matt_fast.initializers.fasttext import TokenVectors
from matt_fast.initializers.mixtures import Mixtures, mixtures, text_tokens
from matt_fast.initializers.word_alignment import encode
from matt_fast.support.texts import bounded_pieces, groups

TOGETHER = 256  # documents counted at a time
SWEEPS = 5  # of the subspace iteration
SPARE = 20  # dimensions more than wanted while it runs


def cooccurrence_vectors(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dim: int = 300,
    window: int = 15,
    min_count: int = 10,
    seed: int = 0,
) -> TokenVectors:
    """Vectors of the tokens that occur often enough, from what they occur beside.

    Tokens at distance d count 1/d for each other, as in GloVe. The positive pointwise mutual information of these
    counts is factorised into the `dim` directions with the largest singular values, each weighted by its square root.

    Args:
        texts: documents.
        tokenizer: a fast tokenizer.
        dim: of the vectors; fewer where fewer tokens occur often enough.
        window: tokens on either side that count.
        min_count: occurrences that a token needs.
        seed: of the directions that the factorisation starts from.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: an option below 1, or no token that occurs often enough beside another.
    """
    check_fast(tokenizer, "tokenizer")
    for name, value in (("dim", dim), ("window", window), ("min_count", min_count)):
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    tokens = token_bytes(tokenizer)
    rows, kept = vocabulary_rows(tokens), text_tokens(tokens)
    counts = np.zeros(rows, np.int64)
    keys, sums = np.zeros(0, np.int64), np.zeros(0)
    pending: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    for together in groups(filter(None, bounded_pieces(texts)), TOGETHER):
        documents = encode(tokenizer, together, kept)
        counts += np.bincount(np.concatenate(documents), minlength=rows)
        pending.append(_count_beside(documents, window, rows))
        if sum(len(part) for part, _ in pending) > len(keys):
            keys, sums = _add_up([(keys, sums), *pending])
            pending = []
    keys, sums = _add_up([(keys, sums), *pending])
    often = counts >= min_count
    inside = often[keys // rows] & often[keys % rows]
    ids, place = np.unique(np.stack([keys[inside] // rows, keys[inside] % rows]), return_inverse=True)
    if len(ids) == 0:
        raise ValueError(f"texts: wanted tokens with {min_count} occurrences (min_count) beside each other, got none")
    matrix = _mutual_information(*place.reshape(2, -1), sums[inside], len(ids))
    return TokenVectors(torch.from_numpy(ids), _factorise(matrix, min(dim, len(ids)), seed), torch.from_numpy(counts))


def _count_beside(documents: list[NDArray[np.int64]], window: int, rows: int):
    """Keys (token * rows + other) and the sums of 1 / distance, for both orders of each two tokens."""
    flat = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    parts = []
    for distance in range(1, min(window, len(flat) - 1) + 1):
        same = owner[:-distance] == owner[distance:]
        left, right = flat[:-distance][same], flat[distance:][same]
        keys = np.concatenate([left * rows + right, right * rows + left])
        parts.append((keys, np.full(len(keys), 1 / distance)))
    return _add_up(parts)


def _add_up(parts):
    keys, place = np.unique(np.concatenate([k for k, _ in parts] or [np.zeros(0, np.int64)]), return_inverse=True)
    return keys, np.bincount(place, np.concatenate([s for _, s in parts] or [np.zeros(0)]), minlength=len(keys))


def _mutual_information(rows: NDArray, columns: NDArray, sums: NDArray[np.float64], size: int) -> torch.Tensor:
    """Sparse [size, size] float32, symmetric: log(p(i, j) / (p(i) p(j))), where it is positive."""
    totals = np.bincount(rows, sums, minlength=size)
    values = np.log(sums * totals.sum() / (totals[rows] * totals[columns]))
    kept = values > 0
    places = torch.from_numpy(np.stack([rows[kept], columns[kept]]))
    values = torch.from_numpy(values[kept]).float()
    return torch.sparse_coo_tensor(places, values, (size, size), check_invariants=False, is_coalesced=True)


def _factorise(matrix: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """[size, dim]: left singular vectors, by falling singular value, times its square root; by subspace iteration."""
    size = len(matrix)
    start = torch.randn(size, min(size, dim + SPARE), generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(start).Q
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(matrix @ basis).Q  # the matrix is symmetric
    left, values, _ = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :dim] * values[:dim].sqrt()


def tokalign_mixtures(
    vocabulary: VocabularyPair,
    source: TokenVectors,
    target: TokenVectors,
    *,
    anchors: int = 300,
    block_bytes: int = 1 << 28,
) -> Mixtures:
    """For each new token with a letter and a vector one token of the teacher.

    Args:
        vocabulary: the two vocabularies.
        source: of the teacher's tokens, and
        target: of the student's, from `cooccurrence_vectors` of the same text.
        anchors: shared tokens that vectors are compared with: those that occur most often in the text.
        block_bytes: bound of the temporary memory for the cosines of a block; at least one row is taken at a time.

    Raises:
        ValueError: no shared token has a vector on both sides.
    """
    place = [{int(i): row for row, i in enumerate(side.ids)} for side in (source, target)]
    shared = [
        (place[0][match.teacher_id], place[1][i])
        for i, match in sorted(vocabulary.matches.items(), key=lambda item: (-int(target.counts[item[0]]), item[0]))
        if match.teacher_id in place[0] and i in place[1]
    ]
    if not shared:
        raise ValueError(
            f"texts: wanted one of the {len(vocabulary.matches)} shared tokens to have vectors on both sides, got none"
        )
    sides = []
    for side, anchor_rows in zip((source, target), torch.tensor(shared[:anchors]).T, strict=True):
        directions = torch.nn.functional.normalize(side.vectors)
        # [n, dim] @ [dim, anchors] -> [n, anchors]
        sides.append(torch.nn.functional.normalize(directions @ directions[anchor_rows].T))
    inside = source.ids < vocabulary.teacher_rows
    teacher_ids, theirs = source.ids[inside], sides[0][inside]
    blocks = sides[1].split(max(1, block_bytes // (4 * len(theirs))))
    nearest = torch.cat([(block @ theirs.T).argmax(1) for block in blocks])
    return mixtures(vocabulary, target.ids, teacher_ids[nearest], torch.ones(len(nearest)), target.counts)
