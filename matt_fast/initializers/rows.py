"""Input and output embeddings of a whole new vocabulary, by a method's name or from someone's files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.choices import INIT_HEADS, INITS, METHODS
from matt_fast.initializers.fasttext import fasttext_vectors
from matt_fast.initializers.focus import apply as focus_apply
from matt_fast.initializers.focus import focus_rows
from matt_fast.initializers.heuristics import Method, initialize
from matt_fast.initializers.mixtures import Mixtures
from matt_fast.initializers.omp import SparseCoefficients, omp_coefficients
from matt_fast.initializers.omp import apply as omp_apply
from matt_fast.initializers.report import InitReport, find_outliers, init_report
from matt_fast.initializers.states import rows_from_states
from matt_fast.initializers.tokalign import cooccurrence_vectors, tokalign_mixtures
from matt_fast.initializers.transtokenizers import transtokenizer_mixtures
from matt_fast.initializers.wechsel import dictionary_from_pairs, train_word_vectors, wechsel_mixtures
from matt_fast.model.checkpoint_files import check_weights
from matt_fast.model.teacher import Teacher
from matt_fast.model.weight_values import check_finite
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
        texts: text in the language or domain of the new tokens; "contextual" and "boundary" read the teacher's states
            in it, "focus" and "omp-self" train fastText on it, "tokalign" counts tokens, and "wechsel" adds it to the
            target side of the pairs.
        donor: folder or hub name of a model that has the student's vocabulary, for "omp".
        parallel: (text in a language that the teacher knows, its translation), for "wechsel" and "transtokenizers".
        init_head: how new output rows start: "same", as the input rows do, or "boundary", from what the teacher expects
            in the text, see `boundary`; a tied table then serves both wishes. "contextual" always does that.
        on_progress: called with the rows done and their number by "omp", "omp-self", "focus" and "contextual".
        **hub_options: for loading that folder, or the donor.

    Raises:
        ValueError: unknown method; texts, pairs or a donor that a method needs and did not get; a folder, file or donor
            whose embeddings do not fit; a masked language model with "contextual" or "boundary".
        ImportError: "focus", "omp-self" and "wechsel" without fastText.
    """
    if init_head not in INIT_HEADS:
        raise ValueError(f"init_head: wanted one of {', '.join(INIT_HEADS)}, got {init_head!r}")
    from_states = needs_whole_model(init, init_head)
    if from_states and texts is None:
        name = f"init {init!r}" if init == "contextual" else f"init_head {init_head!r}"
        raise ValueError(f"texts: wanted text to read the teacher's states in for {name}, got none")
    contextual, init = init == "contextual", "mean" if init == "contextual" else init
    embedding, head = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    made = _new_rows(vocabulary, init, seed, texts, donor, parallel, embedding.weight, on_progress, hub_options)

    def rows(weight: torch.Tensor, name: str, init=init, made=made) -> torch.Tensor:
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

    tied = head is None or head.weight is embedding.weight
    bias = None if head is None else getattr(head, "bias", None)
    if bias is not None:
        known = vocabulary.matches, vocabulary.subtokens
        bias = initialize(bias[:, None], vocabulary.rows, *known, teacher_ids=vocabulary.teacher_tokens)[:, 0]
    input_rows = rows(embedding.weight, "input_embeddings")
    output_rows = None if tied or from_states else rows(head.weight, "output_embeddings")
    report = _report(vocabulary, init, made, input_rows, output_rows)
    if from_states:
        means = rows((embedding if tied else head).weight, "output_embeddings", "mean", None)
        options = {"contextual": contextual, "tied": tied, "seed": seed, "on_progress": on_progress}
        found = rows_from_states(teacher, vocabulary, texts, input_rows, means, bias, **options)
        if contextual:
            report = init_report(vocabulary, found.solved.tolist(), found.counts)
        return Rows(found.input, None if tied else found.output, bias, report)
    return Rows(input_rows, output_rows, bias, report)


def needs_whole_model(init: str | Path | Method, init_head: str) -> bool:
    """Whether `initial_rows` runs the teacher, all its layers; else its embeddings and head are enough."""
    return init == "contextual" or init_head == "boundary"


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
        spelled_only = init in ("mean", "length-mean")
        return init_report(vocabulary, vocabulary.subtokens if spelled_only else _new_ids(vocabulary).tolist())
    strange = ()
    if made.coefficients is not None:
        tables = [input_rows] if output_rows is None else [input_rows, output_rows]
        strange = find_outliers(vocabulary, made.ids, made.coefficients, *(table[made.ids] for table in tables))
    return init_report(vocabulary, made.ids.tolist(), made.counts, strange)


def _new_ids(vocabulary: VocabularyPair) -> torch.Tensor:
    return torch.tensor(vocabulary.new, dtype=torch.int64)


def _new_rows(vocabulary, init, seed, texts, donor, parallel, embedding, on_progress, hub_options) -> _NewRows | None:
    """None where `initialize` does it all."""
    if callable(init) or init in METHODS:
        return None
    if init == "omp":
        if donor is None:
            raise ValueError(
                "donor: wanted a model with the new vocabulary for init 'omp', got none; or use 'omp-self'"
            )
        vectors = _donor_vectors(vocabulary, donor, hub_options)
        return _omp(vocabulary, torch.arange(vocabulary.rows), vectors, None, on_progress)
    if init in ("focus", "omp-self"):
        if texts is None:
            raise ValueError(f"texts: wanted text to train fastText on for init {init!r}, got none")
        vectors = fasttext_vectors(texts, vocabulary.student, seed=seed)
        if init == "omp-self":
            return _omp(vocabulary, vectors.ids, vectors.vectors, vectors.counts, on_progress, centred=True)
        found = focus_rows(embedding, vocabulary, vectors, on_progress=on_progress)
        return _NewRows(found.ids, lambda weight, name: focus_apply(found.coefficients, weight), vectors.counts)
    if init in ("wechsel", "transtokenizers", "tokalign"):
        found = _mixtures(vocabulary, init, seed, texts, parallel)
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
    target = train_word_vectors(Joined([text for _, text in pairs], texts or ()), seed=seed)
    return wechsel_mixtures(vocabulary, source, target, dictionary_from_pairs(pairs))


def open_donor(vocabulary: VocabularyPair, donor: str | Path, hub_options: dict) -> Teacher:
    """The model that rows are taken of for "omp"; its weights are not read.

    Raises:
        ValueError: it cannot be loaded, or has another vocabulary.
    """
    source = _source(donor, "donor: wanted a model with the new tokenizer's vocabulary", hub_options)
    theirs, ours = source.load_tokenizer().get_vocab(), vocabulary.student.get_vocab()
    if different := [token for token, i in ours.items() if theirs.get(token) != i]:
        raise ValueError(
            f"donor: wanted a model with the new tokenizer's vocabulary, but {len(different)} of {len(ours)} tokens "
            f"are missing or have other ids in {str(donor)!r}, {different[0]!r} among them"
        )
    return source


def _donor_vectors(vocabulary: VocabularyPair, donor: str | Path, hub_options: dict) -> torch.Tensor:
    source = open_donor(vocabulary, donor, hub_options)
    weight = source.load(torch.float32, n_layers=1).get_input_embeddings().weight.detach()
    check_finite([("input embeddings", weight)], f"donor: wanted numbers in {str(donor)!r}")
    if len(weight) < vocabulary.rows:
        raise ValueError(f"donor: wanted at least {vocabulary.rows} embedding rows, got {len(weight)}")
    return weight[: vocabulary.rows]


def _omp(
    vocabulary: VocabularyPair,
    ids: torch.Tensor,
    vectors: torch.Tensor,
    counts: torch.Tensor | None,
    on_progress,
    centred: bool = False,
) -> _NewRows:
    """New tokens as sparse combinations of shared ones in a space with a vector for each of `ids`.

    Args:
        centred: both spaces are seen from the mean of the shared tokens, and no row is farther from it than the shared
            ones typically are. A space that is no model's tells where a row lies, but not how far: the coefficients'
            sums differ, each times the mean row, which alone shifts a token's logit by several nats.
    """
    shared = torch.tensor([int(i) in vocabulary.matches for i in ids])
    new = torch.tensor([int(i) in vocabulary.tokens for i in ids]) & ~shared & vectors.any(1)
    origin = vectors[shared].mean(0) if centred else 0
    coefficients = omp_coefficients(vectors[new] - origin, vectors[shared] - origin, on_progress=on_progress)
    teacher_ids = torch.tensor([vocabulary.matches[int(i)].teacher_id for i in ids[shared]])

    def rows(weight: torch.Tensor, name: str) -> torch.Tensor:
        here = coefficients._replace(
            indices=coefficients.indices.to(weight.device), values=coefficients.values.to(weight.device)
        )
        anchors = weight[teacher_ids.to(weight.device)]
        if not centred:
            return omp_apply(here, anchors)
        middle = anchors.float().mean(0)
        beyond = omp_apply(here, anchors.float() - middle)
        usual = (anchors.float() - middle).norm(dim=1).median()
        return middle + beyond * (usual / beyond.norm(dim=1, keepdim=True).clamp_min(usual))

    return _NewRows(ids[new], rows, counts, coefficients)


def ready_rows(path: str | Path, **hub_options) -> dict[str, torch.Tensor]:
    """The tables of a model folder or a .safetensors file, by name.

    Raises:
        ValueError: it is neither, or its weights are not all there.
    """
    wanted = f"init: wanted {', '.join(INITS)}, a model folder or a .safetensors file with ready rows"
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{wanted}; got {str(path)!r}, which is damaged or none ({error})") from error
    source = _source(path, wanted, hub_options)
    model = source.load(torch.float32, n_layers=1)
    head = model.get_output_embeddings()
    found = {"input_embeddings": model.get_input_embeddings().weight.detach()}
    return found if head is None else found | {"output_embeddings": head.weight.detach()}


def _source(path: str | Path, wanted: str, hub_options: dict) -> Teacher:
    """A model that rows are read of, with its weight files looked at."""
    try:
        source = Teacher(path, **hub_options, argument=wanted.split(":")[0])
        check_weights(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{wanted}; got {error}") from error
    return source
