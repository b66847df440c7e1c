"""The new tokens of a finished transfer: how each started, how often it was seen, how far its row moved."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from matt_fast.alignment.vocabulary import Token, VocabularyPair, show_token
from matt_fast.initializers.omp import OUTLIER, robust_scores
from matt_fast.runs.record import PROVENANCE
from matt_fast.show.choices import ORDERS
from matt_fast.support.checks import check_choice

NEIGHBOURS = 3
BLOCK = 1 << 24  # similarities at a time


@dataclass(frozen=True)
class TokenRow:
    """A new token.

    Attributes:
        id, token: its id, and what it stands for, `visible`.
        start: how its row began, of token_provenance.jsonl.
        pieces: the old tokens that spell it.
        trained, seen: whether its row could be trained, and how often it occurred in training.
        norm: of its row now.
        moved: norm of its row's change; None where the start is not known.
        outlier: how unlike the others' its norm or its change is, in robust standard deviations of the logarithms.
        before, after: the old tokens nearest to its row at the start and now, with their cosines; empty until
            `add_neighbours`, `before` also where the start is not known.
    """

    id: int
    token: str
    start: str
    pieces: tuple[str, ...]
    trained: bool
    seen: int
    norm: float
    moved: float | None
    outlier: float
    before: tuple[tuple[str, float], ...] = ()
    after: tuple[tuple[str, float], ...] = ()

    @property
    def stands_out(self) -> bool:
        return self.outlier > OUTLIER


def new_tokens(
    records: list[dict],
    vocabulary: VocabularyPair,
    rows: torch.Tensor,
    start: torch.Tensor | None,
    recorded: bool = False,
) -> list[TokenRow]:
    """Figures of the new tokens, by id.

    Args:
        records: of `read_provenance`.
        vocabulary: the original model's tokenizer and the result's.
        rows: [rows, hidden], the result's table.
        start: [rows, hidden], where it began; None if that is not known.
        recorded: the table is that of input rows: without `start`, how far they moved is what the records say of it.

    Raises:
        ValueError: ids without a row; the original model is another than the one that the records name tokens of.
    """
    ids = torch.tensor([x["id"] for x in records], dtype=torch.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(rows):
        raise ValueError(f"folder: wanted a row for each id of {PROVENANCE}, got {int(ids.max())} and {len(rows)} rows")
    if unknown := {i for x in records for i in x["teacher_ids"]} - vocabulary.teacher_tokens.keys():
        raise ValueError(
            f"model: wanted the one that the transfer began with, whose tokens {PROVENANCE} names by id, got one "
            f"without the id {min(unknown)}"
        )
    norms = rows[ids].float().norm(dim=1)
    moved = None if start is None else (rows[ids].float() - start[ids].float()).norm(dim=1)
    if start is None and recorded and all("moved" in x for x in records):
        moved = torch.tensor([float(x["moved"]) for x in records])
    seen = torch.tensor([x["seen"] > 0 for x in records], dtype=torch.bool)
    scores = _scores(norms, torch.ones_like(seen))
    if moved is not None:
        scores = torch.maximum(scores, _scores(moved, seen & (moved > 0)))
    nothing = Token("text", b"")
    return [
        TokenRow(
            id=record["id"],
            token=show_token(vocabulary.tokens.get(record["id"])),
            start=record["start"],
            pieces=tuple(show_token(vocabulary.teacher_tokens.get(i, nothing)) for i in record["teacher_ids"]),
            trained=record["trained"],
            seen=record["seen"],
            norm=float(norms[place]),
            moved=None if moved is None else float(moved[place]),
            outlier=float(scores[place]),
        )
        for place, record in enumerate(records)
    ]


def choose(tokens: Iterable[TokenRow], search: str | None = None, sort: str = "moved") -> list[TokenRow]:
    """Those that have `search` in them (as it is drawn, or with spaces for ␣), in order: ids rise, all else falls.

    Raises:
        ValueError: an unknown order, or one by a change that is not known.
    """
    check_choice("sort", sort, ORDERS)
    wanted = None if search is None else search.casefold().replace(" ", "␣")
    found = [x for x in tokens if wanted is None or wanted in x.token.casefold()]
    if sort == "moved" and any(x.moved is None for x in found):
        raise ValueError("sort: wanted another order than 'moved', since where the rows started is not known")
    return sorted(found, key=lambda x: (x.id if sort == "id" else -getattr(x, sort), x.id))


def add_neighbours(
    tokens: list[TokenRow],
    vocabulary: VocabularyPair,
    old: torch.Tensor,
    rows: torch.Tensor,
    start: torch.Tensor | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TokenRow]:
    """The tokens with the old tokens nearest to them by cosine, before and now.

    Args:
        tokens: some of `new_tokens`.
        vocabulary: as there.
        old: [teacher rows, hidden], the original model's table.
        rows, start: as there.
        on_progress: called with the tokens done and their number.
    """
    known = torch.tensor(sorted(i for i in vocabulary.teacher_tokens if i < len(old)), dtype=torch.int64)
    base = torch.nn.functional.normalize(old[known].float(), dim=1)
    ids = torch.tensor([x.id for x in tokens], dtype=torch.int64)
    together = max(1, BLOCK // max(1, len(base)))
    found = []
    for first in range(0, len(ids), together):
        part = ids[first : first + together]
        nearest = [() if table is None else _nearest(table[part], base, known, vocabulary) for table in (start, rows)]
        for place, token in enumerate(tokens[first : first + together]):
            before, after = (x[place] if x else () for x in nearest)
            found.append(TokenRow(**{**vars(token), "before": before, "after": after}))
        on_progress(len(found), len(ids))
    return found


def _nearest(queries: torch.Tensor, base: torch.Tensor, known: torch.Tensor, vocabulary: VocabularyPair) -> list:
    # [q, hidden] @ [hidden, old] -> [q, old]
    cosines = torch.nn.functional.normalize(queries.float(), dim=1) @ base.T
    values, places = cosines.topk(min(NEIGHBOURS, len(base)), dim=1)
    return [
        tuple(
            (show_token(vocabulary.teacher_tokens[int(i)]), float(x)) for i, x in zip(known[row], cosine, strict=True)
        )
        for row, cosine in zip(places, values, strict=True)
    ]


def _scores(values: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Robust standard deviations from the median of the logarithms, by those `used`; 0 for the others."""
    scores = torch.zeros_like(values)
    logs = values[used].clamp_min(torch.finfo(values.dtype).tiny).log()
    if len(logs):
        scores[used] = robust_scores(logs)
    return scores
