"""Where a model with a new tokenizer is worse than the original: bits of held-out text by segment."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from matt_fast.alignment.offsets import tokenize
from matt_fast.alignment.segments import align_segments
from matt_fast.alignment.vocabulary import VocabularyPair, show_token
from matt_fast.evaluation.bits_per_byte import (
    PIECE_BYTES,
    check_positions,
    check_scorable,
    cut_pieces,
    specials_around,
    token_nats,
)
from matt_fast.model.positions import position_limit

NEW, OTHERWISE, BEHIND, SAME = "new tokens", "old tokens, split otherwise", "same, behind a change", "same"
KINDS = (NEW, OTHERWISE, BEHIND, SAME)


@dataclass(frozen=True)
class Part:
    """Segments of a kind.

    Attributes:
        kind: "new tokens": one of its tokens is new; "old tokens, split otherwise": other tokens than before, all of
            them old; "same, behind a change": the same tokens as before, and the segment before it changed; "same".
        segments, tokens: how many, and how many tokens of the new tokenizer.
        original, adapted: bits of them under both models, for each byte of the whole text.
    """

    kind: str
    segments: int
    tokens: int
    original: float
    adapted: float


@dataclass(frozen=True)
class Worse:
    """What is written the same way each time it occurs.

    Attributes:
        old, new: its tokens, `visible`.
        count: how often it occurs.
        difference: bits of all of them, adapted minus original, for each byte of the whole text.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    count: int
    difference: float


@dataclass(frozen=True)
class LossBySegment:
    """Attributes:
    n_bytes: UTF-8 bytes of the text.
    original, adapted: bits per byte, the sums over `parts`. What is left out of a segment (text that only one
        tokenizer has a token for) belongs to the segment that it lies in.
    parts: of each kind of `KINDS`.
    worst: where the adapted model loses most, descending.
    """

    n_bytes: int
    original: float
    adapted: float
    parts: tuple[Part, ...]
    worst: tuple[Worse, ...]


@torch.inference_mode()
def loss_by_segment(
    original: PreTrainedModel,
    adapted: PreTrainedModel,
    vocabulary: VocabularyPair,
    documents: Iterable[str | None],
    *,
    pieces: int = 15,
    worst: int = 20,
    on_piece: Callable[[int], None] = lambda done: None,
) -> LossBySegment:
    """Score text under a causal model and under what a transfer made of it, segment by segment.

    A segment is the shortest stretch at whose ends both tokenizers have a boundary, so both models give a probability
    of it, given all before. The pieces are those of `evaluate`, and so are the sums.

    Args:
        original, adapted: causal models, with the first and the second tokenizer of `vocabulary`.
        vocabulary: both sides.
        documents: texts; None for none.
        pieces: of 2,048 bytes, at most.
        worst: how many to tell of.
        on_piece: called with the number of pieces that are scored, after each.

    Raises:
        ValueError: no text with segments; a tokenizer without a bos or eos token; a piece with more tokens than the
            model has positions.
    """
    sides = vocabulary.teacher, vocabulary.student
    for tokenizer in sides:
        check_scorable(tokenizer, masked=False)
    counts: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))  # segments, tokens, bits of both
    written: defaultdict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(2))  # count, difference
    n_bytes, limit = 0, position_limit(original)
    for done, piece in enumerate(islice(cut_pieces(documents, PIECE_BYTES), pieces), 1):
        (old, old_spans), (new, new_spans) = ([x[0] for x in tokenize(side, [piece])] for side in sides)
        owners = align_segments(old_spans, new_spans)
        if not len(owners[0]) or owners[0].max() < 0:
            continue
        n_bytes += len(piece.encode())
        bits = []
        for tokenizer, ids in zip(sides, (old, new), strict=True):
            check_positions(piece, len(ids) + specials_around(tokenizer, masked=False), limit, "data")
        for model, tokenizer, ids, owner in zip((original, adapted), sides, (old, new), owners, strict=True):
            nats = token_nats(model, tokenizer, ids.tolist()).double().cpu().numpy()
            bits.append(np.bincount(owner, nats / np.log(2)))
        cuts = [np.flatnonzero(np.diff(owner)) + 1 for owner in owners]
        before = SAME
        for ours, theirs, *found in zip(np.split(new, cuts[1]), np.split(old, cuts[0]), *bits, strict=True):
            tokens = tuple(ours.tolist()), tuple(theirs.tolist())
            kind = _kind(*tokens, vocabulary, before)
            counts[kind] += (1, len(ours), *found)
            written[tokens] += (1, found[1] - found[0])
            before = kind
        on_piece(done)
    if not n_bytes:
        raise ValueError("documents: wanted text with segments, got none")
    parts = tuple(Part(x, *map(int, counts[x][:2]), *(counts[x][2:] / n_bytes).tolist()) for x in KINDS)
    most = Counter({tokens: difference for tokens, (_, difference) in written.items()}).most_common(worst)
    return LossBySegment(
        n_bytes,
        sum(x.original for x in parts),
        sum(x.adapted for x in parts),
        parts,
        tuple(
            Worse(
                tuple(show_token(vocabulary.teacher_tokens.get(i)) for i in tokens[1]),
                tuple(show_token(vocabulary.tokens.get(i)) for i in tokens[0]),
                int(written[tokens][0]),
                float(difference / n_bytes),
            )
            for tokens, difference in most
        ),
    )


def _kind(ours: tuple[int, ...], theirs: tuple[int, ...], vocabulary: VocabularyPair, before: str) -> str:
    matches = [vocabulary.matches.get(i) for i in ours]
    if None in matches:
        return NEW
    if tuple(x.teacher_id for x in matches if x is not None) != theirs:
        return OTHERWISE
    return SAME if before in (SAME, BEHIND) else BEHIND
