"""Input and output embeddings of a whole new vocabulary, by a method's name or from someone's files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from matt_fast.initializers.heuristics import METHODS, Method, initialize
from matt_fast.teacher import Teacher
from matt_fast.vocabulary import VocabularyPair


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
    teacher: PreTrainedModel, vocabulary: VocabularyPair, init: str | Path | Method, seed: int, **hub_options
) -> Rows:
    """Input and, where untied, output embeddings for the student's vocabulary.

    Args:
        teacher: a language model; only its embeddings and head are read.
        vocabulary: the two vocabularies.
        init: a name of `METHODS` or a function (see `initialize`); or ready rows, of which new tokens take theirs:
            a model folder, or a .safetensors file with "input_embeddings" and, for a model whose head is not tied,
            "output_embeddings", each [student rows or more, hidden].
        seed: of the random draws.
        **hub_options: for loading that folder.

    Raises:
        ValueError: unknown method, or a folder or file whose embeddings do not fit.
    """
    is_method = callable(init) or init in METHODS
    ready = {} if is_method else _ready_rows(init, **hub_options)

    def rows(weight: torch.Tensor, name: str) -> torch.Tensor:
        start = initialize(
            weight,
            vocabulary.rows,
            vocabulary.matches,
            vocabulary.subtokens,
            method=init if is_method else "mean",
            seed=seed,
            teacher_lengths={i: len(token.bytes) for i, token in vocabulary.teacher_tokens.items()},
        )
        if not is_method:
            prepared = ready.get(name)
            shape = None if prepared is None else tuple(prepared.shape)
            if shape is None or shape[0] < start.shape[0] or shape[1:] != start.shape[1:]:
                raise ValueError(
                    f"init: wanted {name} with at least {start.shape[0]} rows of width {start.shape[1]} in "
                    f"{str(init)!r}, got {shape or ', '.join(ready)}"
                )
            new = [i for i in vocabulary.tokens if i not in vocabulary.matches]
            start[new] = prepared[new].float()
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


def _ready_rows(path: str | Path, **hub_options) -> dict[str, torch.Tensor]:
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        return load_file(path)
    try:
        source = Teacher(path, **hub_options)
    except ValueError as error:
        raise ValueError(
            f"init: wanted {', '.join(METHODS)}, a model folder or a .safetensors file with ready rows; got {error}"
        ) from error
    model = source.load(torch.float32, n_layers=1)
    head = model.get_output_embeddings()
    found = {"input_embeddings": model.get_input_embeddings().weight.detach()}
    return found if head is None else found | {"output_embeddings": head.weight.detach()}
