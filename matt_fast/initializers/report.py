"""What an initialiser did: how many rows came from where, and which tokens stand out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.omp import SparseCoefficients, outliers
from matt_fast.support.checks import check_type, made_of


@dataclass(frozen=True)
class Outlier:
    """A token whose coefficients or row are unlike the others', see `omp.outliers`: perhaps a poisoned one.

    Attributes:
        token: its text; bytes that are none are escaped.
        coefficient_sum: of its coefficients.
        coefficient_norm, row_norm: the lengths of its coefficients and of its input row, over the median's.
        output_row_norm: of its output row, likewise; None where the method made none or the head is tied.
    """

    token: str
    coefficient_sum: float
    coefficient_norm: float
    row_norm: float
    output_row_norm: float | None = None


@dataclass(frozen=True)
class InitReport:
    """Where the input rows of a vocabulary came from. The first four and `own` add up to its tokens.

    Attributes:
        shared: tokens with the teacher's row.
        initialized: new tokens whose row the method made itself.
        subtoken_mean: new tokens that the method left to the mean of their sub-tokens' rows ("contextual" starts from
            the last sub-token's).
        unspelled: those left over that the teacher's tokens cannot spell: they have the mean of all rows.
        unseen: how many of `subtoken_mean` never occur in the text; None where no text was counted.
        outliers: of "omp" and "omp-self", the worst first.
        made: the ids of `initialized`.
        own: new tokens that the model has already, whose rows train on.
    """

    shared: int
    initialized: int
    subtoken_mean: int
    unspelled: int
    unseen: int | None = None
    outliers: tuple[Outlier, ...] = ()
    made: frozenset[int] = frozenset()
    own: int = 0

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "InitReport":
        """The report whose fields JSON gave back, with lists for tuples and sets."""
        outliers = tuple(made_of(Outlier, x) for x in values["outliers"])
        check_type("made", values["made"], list[int])
        return made_of(cls, {**values, "outliers": outliers, "made": frozenset(values["made"])})


def init_report(
    vocabulary: VocabularyPair,
    initialized: Iterable[int],
    counts: torch.Tensor | None = None,
    outliers: tuple[Outlier, ...] = (),
) -> InitReport:
    """Count a vocabulary's rows.

    Args:
        vocabulary: the two vocabularies.
        initialized: new tokens whose rows the method made itself.
        counts: [student rows], how often each token occurs in the text; None if none was read.
        outliers: from `find_outliers`.
    """
    initialized = frozenset(initialized) - vocabulary.own
    left = vocabulary.tokens.keys() - vocabulary.matches.keys() - initialized - vocabulary.own
    means = sorted(left & vocabulary.subtokens.keys())
    return InitReport(
        shared=len(vocabulary.matches),
        initialized=len(initialized),
        subtoken_mean=len(means),
        unspelled=len(left) - len(means),
        unseen=None if counts is None else int((counts[means] == 0).sum()),
        outliers=outliers,
        made=initialized,
        own=len(vocabulary.own),
    )


def find_outliers(
    vocabulary: VocabularyPair,
    ids: torch.Tensor,
    coefficients: SparseCoefficients,
    rows: torch.Tensor,
    output_rows: torch.Tensor | None = None,
) -> tuple[Outlier, ...]:
    """Tokens that stand out by the rule of `omp.outliers`, the worst first.

    Args:
        vocabulary: the two vocabularies.
        ids: [m] int64, the new tokens.
        coefficients: [m, k], theirs.
        rows, output_rows: [m, hidden], made with them; the latter None where the head is tied.
    """
    device = coefficients.values.device
    found = outliers(coefficients, rows.to(device), None if output_rows is None else output_rows.to(device))
    used = torch.ones(len(ids), dtype=torch.bool)
    used[found.empty] = False
    lengths = {name: measure for name, measure in found.measures.items() if name != "sum"}
    relative = {name: length / length[used].median() for name, length in lengths.items()}
    return tuple(
        Outlier(
            vocabulary.tokens[int(ids[place])].bytes.decode(errors="backslashreplace"),
            float(found.measures["sum"][place]),
            float(relative["coefficients"][place]),
            float(relative["row"][place]),
            float(relative["output row"][place]) if "output row" in relative else None,
        )
        for place in found.tokens.tolist()
    )
