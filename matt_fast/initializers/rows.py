"""Input and output embeddings of a whole new vocabulary, by a method's name or from someone's files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.choices import FROM_DONOR, FROM_STATES, INIT_HEADS, METHODS, PIECES
from matt_fast.initializers.donors import donor_tables, mapped_rows, omp_rows, ready_rows
from matt_fast.initializers.fasttext import fasttext_vectors
from matt_fast.initializers.focus import focus_mixtures
from matt_fast.initializers.heuristics import Method, initialize
from matt_fast.initializers.mixtures import Mixtures
from matt_fast.initializers.omp import SparseCoefficients
from matt_fast.initializers.report import InitReport, find_outliers, init_report
from matt_fast.initializers.states import rows_from_states
from matt_fast.initializers.tokalign import cooccurrence_vectors, tokalign_mixtures
from matt_fast.initializers.transtokenizers import transtokenizer_mixtures
from matt_fast.initializers.wechsel import dictionary_from_pairs, train_word_vectors, wechsel_mixtures
from matt_fast.model.head import one_table
from matt_fast.support.texts import Joined


@dataclass(frozen=True)
class Rows:
    """Embeddings of a whole vocabulary.

    Attributes:
        input: [student rows, hidden] float.
        output: [student rows, hidden], the head's; None where it is tied to the input embedding.
        output_bias: [student rows]; None where the head has no bias.
        report: where the input rows came from, if an initialiser made them.
    """

    input: torch.Tensor
    output: torch.Tensor | None
    output_bias: torch.Tensor | None
    report: InitReport | None = None


def initial_rows(
    teacher: PreTrainedModel,
    vocabulary: VocabularyPair,
    init: str | Path | Method,
    seed: int,
    *,
    texts: Iterable[str] | None = None,
    donor: str | Path | None = None,
    parallel: Iterable[tuple[str, str]] | None = None,
    init_head: str = "same",
    omp_k: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    **hub_options,
) -> Rows:
    """Input and, where untied, output embeddings for the student's vocabulary.

    Args:
        teacher: a language model; only its embeddings and head are read, but see `needs_whole_model`.
        vocabulary: the two vocabularies.
        init: a name of `INITS`, a function (see `initialize`), or ready rows, of which new tokens take theirs: a model
            folder, or a .safetensors file with "input_embeddings" and, for a model whose head is not tied,
            "output_embeddings", each [student rows or more, hidden].
        seed: of random draws, and of the fastText model.
        texts: text in the language or domain of the new tokens; "composed", "contextual" and "boundary" read the
            teacher's states in it, "focus" and "omp-self" train fastText on it, "tokalign" counts tokens, and "wechsel"
            adds it to the target side of the pairs.
        donor: folder or hub name of a model that has the student's vocabulary, for "omp" and "linear-map".
        parallel: (text in a language that the teacher knows, its translation), for "wechsel" and "transtokenizers".
        init_head: how new output rows start: "same", as the input rows do, or "boundary", from what the teacher expects
            in the text, see `boundary`; a tied table then serves both wishes. With "composed" and "contextual", which
            are for input rows, "same" is "boundary". For an untied head also any other name of `INIT_HEADS`.
        omp_k: shared tokens that a new one is a combination of, at most, for "omp" and "omp-self".
        on_progress: called with what is done and what there is to do, by methods that take long.
        **hub_options: for loading that folder, or the donor.

    Raises:
        ValueError: unknown method; texts, pairs or a donor that a method needs and did not get; a folder, file or donor
            whose embeddings do not fit; a masked language model with "composed", "contextual" or "boundary"; an
            `init_head` of its own for a tied head.
        ImportError: "focus", "omp-self" and "wechsel" without fastText.
    """
    embedding, head = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    check_init_head(init_head, teacher)
    if needs_whole_model(init, init_head) and texts is None:
        name = f"init {init!r}" if init in FROM_STATES else f"init_head {init_head!r}"
        raise ValueError(f"texts: wanted text to read the teacher's states in for {name}, got none")
    solved, init = (init, "mean") if init in FROM_STATES else (None, init)
    boundary = init_head == "boundary" or (solved is not None and init_head == "same")
    given = texts, donor, parallel, embedding.weight, omp_k, on_progress, hub_options
    made = _new_rows("init", vocabulary, init, seed, *given)
    tied = one_table(teacher)
    bias = None if head is None else getattr(head, "bias", None)
    if bias is not None:
        known = vocabulary.matches, vocabulary.subtokens
        bias = initialize(bias[:, None], vocabulary.rows, *known, teacher_ids=vocabulary.teacher_tokens)[:, 0]
    table = partial(_table, vocabulary, seed)
    input_rows, output_rows = table(embedding.weight, "input_embeddings", init, made), None
    if boundary:
        output_rows = table((embedding if tied else head).weight, "output_embeddings", "mean", None)
    elif init_head not in ("same", init):
        made_output = _new_rows("init_head", vocabulary, init_head, seed, *given)
        output_rows = table(head.weight, "output_embeddings", init_head, made_output)
    elif not tied:
        output_rows = table(head.weight, "output_embeddings", init, made)
    if not boundary and solved is None:
        return Rows(input_rows, output_rows, bias, _report(vocabulary, init, made, input_rows, output_rows))
    options = {"solved": solved, "boundary": boundary, "tied": tied, "seed": seed, "on_progress": on_progress}
    found = rows_from_states(teacher, vocabulary, texts, input_rows, output_rows, bias, **options)
    if solved is None:
        report = _report(vocabulary, init, made, input_rows, None)
    else:
        report = init_report(vocabulary, found.solved.tolist(), found.counts)
    return Rows(found.input, None if tied else found.output, bias, report)


def _table(
    vocabulary: VocabularyPair, seed: int, weight: torch.Tensor, name: str, init: str | Method, made: "_NewRows | None"
) -> torch.Tensor:
    """[student rows, hidden] float32: shared rows of the teacher's table `weight`, and new ones by a method."""
    start = initialize(
        weight,
        vocabulary.rows,
        vocabulary.matches,
        vocabulary.subtokens,
        method="mean" if made else init,
        seed=seed,
        teacher_lengths={i: len(token.bytes) for i, token in vocabulary.teacher_tokens.items()},
        teacher_ids=vocabulary.teacher_tokens,
    )
    if made:
        start[made.ids] = made.rows(weight.detach(), name).float().to(start.device)
    for new, old in vocabulary.mapped.items():
        start[new] = weight.detach()[old].float().mean(0)
    return start


def check_init_head(init_head: str, model: PreTrainedModel) -> None:
    """Raise a ValueError for an unknown name, and for one that wants rows of its own for a head that has none."""
    if init_head not in INIT_HEADS:
        raise ValueError(f"init_head: wanted one of {', '.join(INIT_HEADS)}, got {init_head!r}")
    if init_head not in ("same", "boundary") and one_table(model):
        raise ValueError(
            "init_head: wanted same or boundary for a model whose output head is tied to its input embedding, so that "
            f"one row serves both (or untie, for a head of its own), got {init_head!r}"
        )


def needs_whole_model(init: str | Path | Method, init_head: str) -> bool:
    """Whether `initial_rows` runs the teacher, all its layers; else its embeddings and head are enough."""
    return init in FROM_STATES or init_head == "boundary"


@dataclass(frozen=True)
class _NewRows:
    """New tokens' rows beyond those of `initialize`; tokens left out keep the mean of their sub-tokens.

    Attributes:
        ids: [n] int64, the tokens.
        rows: of a table of the teacher ([rows, hidden], its name) gives [n, hidden].
        counts: [student rows], how often each token occurs in a text, if one was read.
        coefficients: [n, k], of OMP.
    """

    ids: torch.Tensor
    rows: Callable[[torch.Tensor, str], torch.Tensor]
    counts: torch.Tensor | None = None
    coefficients: SparseCoefficients | None = None


def _report(vocabulary, init, made: _NewRows | None, input_rows, output_rows) -> InitReport:
    """Which rows the method made, and which of them are unlike the others."""
    if made is None:
        spelled_only = init in PIECES
        return init_report(vocabulary, vocabulary.subtokens if spelled_only else _new_ids(vocabulary).tolist())
    strange = ()
    if made.coefficients is not None:
        tables = [input_rows] if output_rows is None else [input_rows, output_rows]
        strange = find_outliers(vocabulary, made.ids, made.coefficients, *(table[made.ids] for table in tables))
    return init_report(vocabulary, made.ids.tolist(), made.counts, strange)


def _new_ids(vocabulary: VocabularyPair) -> torch.Tensor:
    return torch.tensor(vocabulary.new, dtype=torch.int64)


def _new_rows(
    argument, vocabulary, init, seed, texts, donor, parallel, embedding, omp_k, on_progress, hub_options
) -> _NewRows | None:
    """None where `initialize` does it all; `argument` is what errors call `init`."""
    if callable(init) or init in METHODS:
        return None
    if init in FROM_DONOR:
        if donor is None:
            raise ValueError(f"donor: wanted a model with the new vocabulary for {argument} {init!r}, got none")
        tables = donor_tables(vocabulary, donor, hub_options)
        if init == "linear-map":
            return _NewRows(*mapped_rows(vocabulary, tables))
        ids, rows, coefficients = omp_rows(vocabulary, torch.arange(vocabulary.rows), tables, omp_k, on_progress)
        return _NewRows(ids, rows, None, coefficients)
    if init in ("focus", "omp-self"):
        if texts is None:
            raise ValueError(f"texts: wanted text to train fastText on for {argument} {init!r}, got none")
        vectors = fasttext_vectors(texts, vocabulary.student, seed=seed)
        if init == "omp-self":
            space = {"input_embeddings": vectors.vectors}
            ids, rows, coefficients = omp_rows(vocabulary, vectors.ids, space, omp_k, on_progress, centred=True)
            return _NewRows(ids, rows, vectors.counts, coefficients)
        mixed = focus_mixtures(vocabulary, vectors, embedding.device, on_progress)
        return _NewRows(mixed.ids, lambda weight, name: mixed.rows(weight), mixed.counts)
    if init in ("wechsel", "transtokenizers", "tokalign"):
        found = _mixtures(argument, vocabulary, init, seed, texts, parallel)
        return _NewRows(found.ids, lambda weight, name: found.rows(weight), found.counts)
    ready, new = ready_rows(init, **hub_options), _new_ids(vocabulary)

    def prepared(weight: torch.Tensor, name: str) -> torch.Tensor:
        table = ready.get(name)
        shape = None if table is None else tuple(table.shape)
        if shape is None or shape[0] < vocabulary.rows or shape[1:] != weight.shape[1:]:
            raise ValueError(
                f"init: wanted {name} with at least {vocabulary.rows} rows of width {weight.shape[1]} in "
                f"{str(init)!r}, got {shape or ', '.join(ready)}"
            )
        return table[new]

    return _NewRows(new, prepared)


def _mixtures(argument, vocabulary, init, seed, texts, parallel) -> Mixtures:
    if init == "tokalign":
        if texts is None:
            raise ValueError(f"texts: wanted text to count tokens in for {argument} {init!r}, got none")
        sides = (vocabulary.teacher, vocabulary.student)
        return tokalign_mixtures(vocabulary, *(cooccurrence_vectors(texts, side, seed=seed) for side in sides))
    if parallel is None:
        raise ValueError(f"parallel: wanted pairs of texts and translations for {argument} {init!r}, got none")
    pairs = list(parallel)
    if init == "transtokenizers":
        return transtokenizer_mixtures(pairs, vocabulary)
    source = train_word_vectors((text for text, _ in pairs), seed=seed)
    target = train_word_vectors(Joined([text for _, text in pairs], texts or ()), seed=seed)
    return wechsel_mixtures(vocabulary, source, target, dictionary_from_pairs(pairs))
