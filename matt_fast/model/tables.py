"""Which of a model's tensors have a row for each token of the vocabulary, told by shapes alone."""

import copy
import re

import torch
from transformers import PreTrainedModel

from matt_fast.model.teacher import Teacher, only_errors

STEP = 8  # rows more, to see what follows
# Vocabularies of tokens; a model may have others: of segments, sounds, images, entities.
VOCABULARY = re.compile(r"^vocab_size|^(?:text|decoder|output|unigram)_vocab_size$")
OTHER_IDS = ("additional_vocab_size", "vocab_offset")  # rows of a second table, for ids behind those of the first
BY_SEVERAL = re.compile(r"ngram|engram")  # tables by hashes of several tokens' ids


def check_tables(teacher: Teacher) -> None:
    """Look whether the input embedding and the output head are all that a new vocabulary has to replace.

    Per-layer embeddings, experts chosen by token id and heads of two parts are such tables too; they would keep the
    rows of the old vocabulary, each for another token.

    Raises:
        ValueError: there are others, which it names, or the two cannot be given more rows.
    """
    text_config = teacher.config.get_text_config(decoder=True)
    wanted = "model: wanted one with a row for each token in its input embedding and its output head alone, but "
    for config in {id(x): x for x in (teacher.config, text_config)}.values():
        if other := [name for name in OTHER_IDS if getattr(config, name, None)]:
            raise ValueError(f"{wanted}{str(teacher.model)!r} has a second table for further ids ({other[0]})")
    plain = teacher.outline(torch.float32)
    shapes = _shapes(plain)
    wider = _shapes(_wider(teacher))
    by_token = {name for name, shape in shapes.items() if wider.get(name) != shape}
    by_token |= {name for name in shapes if BY_SEVERAL.search(name)}
    if other := sorted(by_token - table_names(plain)):
        raise ValueError(f"{wanted}{str(teacher.model)!r} has such rows in {', '.join(other)} too")
    with only_errors(), torch.device("meta"):
        rows = len(plain.get_input_embeddings().weight)
        plain.resize_token_embeddings(rows + STEP, mean_resizing=False)
    now = _shapes(plain)
    if different := sorted(name for name in wider.keys() | now.keys() if wider.get(name) != now.get(name)):
        lines = [f"{name} {now.get(name)} instead of {wider.get(name)}" for name in different[:5]]
        raise ValueError(
            f"model: wanted one that transformers gives as many more rows as its configuration then says, but with "
            f"{STEP} more {str(teacher.model)!r} has {', '.join(lines)}"
        )


def table_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors with a row for each token: input embedding, output head, its bias; all that are tied."""
    head = model.get_output_embeddings()
    known = [model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    places = {id(x) for x in known if x is not None}
    return {name for name, tensor in _tensors(model).items() if id(tensor) in places}


def _wider(teacher: Teacher):
    """The outline of the model whose configuration says that it has more tokens."""
    config = copy.deepcopy(teacher.config)
    text_config = config.get_text_config(decoder=True)
    for name, value in list(vars(text_config).items()):
        if VOCABULARY.search(name) and isinstance(value, int) and value:
            setattr(text_config, name, value + STEP)
    return teacher.outline(torch.float32, config=config)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
