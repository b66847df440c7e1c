"""Input and output embeddings of a whole new vocabulary, by a method's name or from someone's files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from matt_fast.initializers.focus import fasttext_vectors, focus_rows
from matt_fast.initializers.heuristics import METHODS, Method, initialize
from matt_fast.initializers.mixtures import Mixtures
from matt_fast.initializers.omp import apply as omp_apply
from matt_fast.initializers.omp import omp_coefficients
from matt_fast.initializers.tokalign import cooccurrence_vectors, tokalign_mixtures
from matt_fast.initializers.transtokenizers import transtokenizer_mixtures
from matt_fast.initializers.wechsel import dictionary_from_pairs, train_word_vectors, wechsel_mixtures
from matt_fast.teacher import Teacher
from matt_fast.vocabulary import VocabularyPair

INITS = (*METHODS, "focus", "omp", "omp-self", "wechsel", "transtokenizers", "tokalign")


@dataclass(frozen=True)
class Rows:
    """Embeddings of a whole vocabulary.

    Attributes:
        input: [student rows, hidden] float.
        output: [student rows, hidden], the head's; None where it is tied to the input embedding.
        output_bias: [student rows]; None where the head has no bias.
    """

    input: torch.Tensor
    output: torch.Tensor | None
    output_bias: torch.Tensor | None


def initial_rows(
    teacher: PreTrainedModel,
    vocabulary: VocabularyPair,
    init: str | Path | Method,
    seed: int,
    *,
    texts: Iterable[str] | None = None,
    donor: str | Path | None = None,
    parallel: Iterable[tuple[str, str]] | None = None,
    **hub_options,
) -> Rows:
    """Input and, where untied, output embeddings for the student's vocabulary.

    Args:
        teacher: a language model; only its embeddings and head are read.
        vocabulary: the two vocabularies.
        init: a name of `INITS`, a function (see `initialize`), or ready rows, of which new tokens take theirs: a model
            folder, or a .safetensors file with "input_embeddings" and, for a model whose head is not tied,
            "output_embeddings", each [student rows or more, hidden].
        seed: of random draws, and of the fastText model.
        texts: text in the language or domain of the new tokens; "focus" and "omp-self" train fastText on it,
            "tokalign" counts tokens, and "wechsel" adds it to the target side of the pairs.
        donor: folder or hub name of a model that has the student's vocabulary, for "omp".
        parallel: (text in a language that the teacher knows, its translation), for "wechsel" and "transtokenizers".
        **hub_options: for loading that folder, or the donor.

    Raises:
        ValueError: unknown method; texts, pairs or a donor that a method needs and did not get; a folder, file or donor
            whose embeddings do not fit.
        ImportError: "focus", "omp-self" and "wechsel" without fastText.
    """
    new_rows = _new_rows(vocabulary, init, seed, texts, donor, parallel, hub_options)

    def rows(weight: torch.Tensor, name: str) -> torch.Tensor:
        start = initialize(
            weight,
            vocabulary.rows,
            vocabulary.matches,
            vocabulary.subtokens,
            method="mean" if new_rows else init,
            seed=seed,
            teacher_lengths={i: len(token.bytes) for i, token in vocabulary.teacher_tokens.items()},
        )
        if new_rows:
            ids, found = new_rows(weight.detach(), name)
            start[ids] = found.float().to(start.device)
        return start

    head = teacher.get_output_embeddings()
    tied = head is None or head.weight is teacher.get_input_embeddings().weight
    bias = None if head is None else getattr(head, "bias", None)
    return Rows(
        input=rows(teacher.get_input_embeddings().weight, "input_embeddings"),
        output=None if tied else rows(head.weight, "output_embeddings"),
        output_bias=None
        if bias is None
        else initialize(bias[:, None], vocabulary.rows, vocabulary.matches, vocabulary.subtokens)[:, 0],
    )


# Of a table of the teacher ([rows, hidden], its name): ids of new tokens, and their rows.
NewRows = Callable[[torch.Tensor, str], tuple[torch.Tensor, torch.Tensor]]


def _new_rows(vocabulary, init, seed, texts, donor, parallel, hub_options) -> NewRows | None:
    """How rows beyond those of `initialize` are made; tokens that it leaves out keep the mean of their sub-tokens."""
    if callable(init) or init in METHODS:
        return None
    if init == "omp":
        if donor is None:
            raise ValueError(
                "donor: wanted a model with the new vocabulary for init 'omp', got none; or use 'omp-self'"
            )
        return _omp(vocabulary, torch.arange(vocabulary.rows), _donor_vectors(vocabulary, donor, hub_options))
    if init in ("focus", "omp-self"):
        if texts is None:
            raise ValueError(f"texts: wanted text to train fastText on for init {init!r}, got none")
        vectors = fasttext_vectors(texts, vocabulary.student, seed=seed)
        if init == "omp-self":
            return _omp(vocabulary, vectors.ids, vectors.vectors)

        def focus(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
            found = focus_rows(weight, vocabulary, vectors)
            return found.ids, found.rows

        return focus
    if init in ("wechsel", "transtokenizers", "tokalign"):
        found = _mixtures(vocabulary, init, seed, texts, parallel)
        return lambda weight, name: (found.ids, found.rows(weight))
    ready = _ready_rows(init, **hub_options)

    def prepared(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        table = ready.get(name)
        shape = None if table is None else tuple(table.shape)
        if shape is None or shape[0] < vocabulary.rows or shape[1:] != weight.shape[1:]:
            raise ValueError(
                f"init: wanted {name} with at least {vocabulary.rows} rows of width {weight.shape[1]} in "
                f"{str(init)!r}, got {shape or ', '.join(ready)}"
            )
        new = torch.tensor([i for i in vocabulary.tokens if i not in vocabulary.matches], dtype=torch.int64)
        return new, table[new]

    return prepared


def _mixtures(vocabulary, init, seed, texts, parallel) -> Mixtures:
    if init == "tokalign":
        if texts is None:
            raise ValueError("texts: wanted text to count tokens in for init 'tokalign', got none")
        sides = (vocabulary.teacher, vocabulary.student)
        return tokalign_mixtures(vocabulary, *(cooccurrence_vectors(texts, side, seed=seed) for side in sides))
    if parallel is None:
        raise ValueError(f"parallel: wanted pairs of texts and translations for init {init!r}, got none")
    pairs = list(parallel)
    if init == "transtokenizers":
        return transtokenizer_mixtures(pairs, vocabulary)
    source = train_word_vectors((text for text, _ in pairs), seed=seed)
    target = train_word_vectors(chain((text for _, text in pairs), texts or ()), seed=seed)
    return wechsel_mixtures(vocabulary, source, target, dictionary_from_pairs(pairs))


def _donor_vectors(vocabulary: VocabularyPair, donor: str | Path, hub_options: dict) -> torch.Tensor:
    source = Teacher(donor, **hub_options)
    theirs, ours = source.load_tokenizer().get_vocab(), vocabulary.student.get_vocab()
    if different := [token for token, i in ours.items() if theirs.get(token) != i]:
        raise ValueError(
            f"donor: wanted a model with the new tokenizer's vocabulary, but {len(different)} of {len(ours)} tokens "
            f"are missing or have other ids in {str(donor)!r}, {different[0]!r} among them"
        )
    weight = source.load(torch.float32, n_layers=1).get_input_embeddings().weight.detach()
    if len(weight) < vocabulary.rows:
        raise ValueError(f"donor: wanted at least {vocabulary.rows} embedding rows, got {len(weight)}")
    return weight[: vocabulary.rows]


def _omp(vocabulary: VocabularyPair, ids: torch.Tensor, vectors: torch.Tensor) -> NewRows:
    """New tokens as sparse combinations of shared ones in a space with a vector for each of `ids`."""
    shared = torch.tensor([int(i) in vocabulary.matches for i in ids])
    new = torch.tensor([int(i) in vocabulary.tokens for i in ids]) & ~shared & vectors.any(1)
    coefficients = omp_coefficients(vectors[new], vectors[shared])
    teacher_ids = torch.tensor([vocabulary.matches[int(i)].teacher_id for i in ids[shared]])
    return lambda weight, name: (ids[new], omp_apply(coefficients, weight[teacher_ids.to(weight.device)]))


def _ready_rows(path: str | Path, **hub_options) -> dict[str, torch.Tensor]:
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        return load_file(path)
    try:
        source = Teacher(path, **hub_options)
    except ValueError as error:
        raise ValueError(
            f"init: wanted {', '.join(INITS)}, a model folder or a .safetensors file with ready rows; got {error}"
        ) from error
    model = source.load(torch.float32, n_layers=1)
    head = model.get_output_embeddings()
    found = {"input_embeddings": model.get_input_embeddings().weight.detach()}
    return found if head is None else found | {"output_embeddings": head.weight.detach()}
