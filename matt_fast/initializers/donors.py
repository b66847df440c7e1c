"""New rows from a donor, a model that has the new vocabulary: sparse combinations of shared tokens, or a linear map."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.choices import INITS
from matt_fast.initializers.linear import linear_map
from matt_fast.initializers.omp import SparseCoefficients, omp_coefficients
from matt_fast.initializers.omp import apply as omp_apply
from matt_fast.model.checkpoint_files import check_weights
from matt_fast.model.teacher import Teacher
from matt_fast.model.weight_values import check_finite

Tables = dict[str, torch.Tensor]  # "input_embeddings", "output_embeddings" -> [rows, hidden]


def open_donor(vocabulary: VocabularyPair, donor: str | Path, hub_options: dict) -> Teacher:
    """The model that rows are taken of for "omp" and "linear-map"; its weights are not read.

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


def donor_tables(vocabulary: VocabularyPair, donor: str | Path, hub_options: dict) -> Tables:
    """The donor's rows of the new vocabulary: of its input embedding, and of its head where that is not tied."""
    model = open_donor(vocabulary, donor, hub_options).load(torch.float32, n_layers=1)
    tables = _tables(model)
    for name, weight in tables.items():
        check_finite([(name.replace("_", " "), weight)], f"donor: wanted numbers in {str(donor)!r}")
        if len(weight) < vocabulary.rows:
            raise ValueError(f"donor: wanted at least {vocabulary.rows} rows of {name}, got {len(weight)}")
    return {name: weight[: vocabulary.rows] for name, weight in tables.items()}


def _tables(model) -> Tables:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {"input_embeddings": embedding.weight.detach()}
    if head is not None and head.weight is not embedding.weight:
        found["output_embeddings"] = head.weight.detach()
    return found


def shared_and_new(vocabulary: VocabularyPair, vectors: torch.Tensor, ids: torch.Tensor):
    """Of `ids` [n] with `vectors` [n, dim]: which are shared, which are new and have a vector; [n] bool each."""
    shared = torch.tensor([int(i) in vocabulary.matches for i in ids])
    return shared, torch.tensor([int(i) in vocabulary.tokens for i in ids]) & ~shared & vectors.any(1)


def omp_rows(
    vocabulary: VocabularyPair, ids: torch.Tensor, tables: Tables, k: int, on_progress, centred: bool = False
) -> tuple[torch.Tensor, Callable[[torch.Tensor, str], torch.Tensor], SparseCoefficients]:
    """New tokens as sparse combinations of shared ones in a space with a vector for each of `ids`.

    Args:
        vocabulary: the two vocabularies.
        ids: [n] int64.
        tables: [n, dim] the space; where "output_embeddings" are among them, output rows are combined as in these.
        k: anchors of a token, at most.
        on_progress: called with the rows done and their number, for the input's.
        centred: both spaces are seen from the mean of the shared tokens, and no row is farther from it than the shared
            ones typically are. A space that is no model's tells where a row lies, but not how far: the coefficients'
            sums differ, each times the mean row, which alone shifts a token's logit by several nats.

    Returns:
        the new ids; what gives their rows of a table of the teacher and its name; the coefficients of the input's.
    """
    vectors = tables["input_embeddings"]
    shared, new = shared_and_new(vocabulary, vectors, ids)
    teacher_ids = torch.tensor([vocabulary.matches[int(i)].teacher_id for i in ids[shared]])
    found: dict[str, SparseCoefficients] = {}

    def coefficients(name: str) -> SparseCoefficients:
        name = name if name in tables else "input_embeddings"
        if name not in found:
            table, tell = tables[name], on_progress if name == "input_embeddings" else None
            origin = table[shared].mean(0) if centred else 0
            found[name] = omp_coefficients(table[new] - origin, table[shared] - origin, k, on_progress=tell)
        return found[name]

    def rows(weight: torch.Tensor, name: str) -> torch.Tensor:
        here = coefficients(name)
        here = here._replace(indices=here.indices.to(weight.device), values=here.values.to(weight.device))
        anchors = weight[teacher_ids.to(weight.device)]
        if not centred:
            return omp_apply(here, anchors)
        middle = anchors.float().mean(0)
        beyond = omp_apply(here, anchors.float() - middle)
        usual = (anchors.float() - middle).norm(dim=1).median()
        return middle + beyond * (usual / beyond.norm(dim=1, keepdim=True).clamp_min(usual))

    return ids[new], rows, coefficients("input_embeddings")


def mapped_rows(
    vocabulary: VocabularyPair, tables: Tables
) -> tuple[torch.Tensor, Callable[[torch.Tensor, str], torch.Tensor]]:
    """New tokens' rows carried over from a donor by the linear map that fits the shared tokens, see `linear_map`.

    Args:
        vocabulary: the two vocabularies.
        tables: [student rows, dim] of the donor; the head's rows are mapped from its head's where it has one.

    Returns:
        the new ids; what gives their rows of a table of the teacher and its name.
    """
    vectors = tables["input_embeddings"]
    ids = torch.arange(vocabulary.rows)
    shared, new = shared_and_new(vocabulary, vectors, ids)
    if shared.sum() < 2:
        raise ValueError(f"init: wanted at least 2 shared tokens to fit the map of 'linear-map' to, got {shared.sum()}")
    teacher_ids = torch.tensor([vocabulary.matches[int(i)].teacher_id for i in ids[shared]])

    def rows(weight: torch.Tensor, name: str) -> torch.Tensor:
        table = tables.get(name, vectors).to(weight.device)
        return linear_map(table[shared], weight[teacher_ids.to(weight.device)])(table[new])

    return ids[new], rows


def ready_rows(path: str | Path, **hub_options) -> Tables:
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
