"""A model of `matt_fast.modeling` as what training needs: frozen, with its rows in tables, which are written back."""

import torch

from matt_fast.model.embeddings import EmbeddingTable, embed
from matt_fast.model.head import Head, logit_rule
from matt_fast.modeling.base import PreTrainedModelForAIM
from matt_fast.modeling.embeddings import PartlyFrozenEmbeddings
from matt_fast.training.loop import freeze
from matt_fast.training.sides import Student


def place(model: PreTrainedModelForAIM, name: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Frozen, on the device, in the dtype asked for or as loaded."""
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(device=device, dtype=dtype or parameter.dtype)
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"{name}: wanted weights in bfloat16 or float32, got float16, for which gradients of the AIM loss are "
                "too small; load it with dtype=torch.bfloat16"
            )
    model.to(device)
    freeze(model.trunk)


def input_table(model: PreTrainedModelForAIM) -> torch.Tensor:
    """[rows, dim]: the input embeddings as one table, without a gradient."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PartlyFrozenEmbeddings):
        embedding = embedding.to_embeddings()
    return embedding.weight.detach()


def student_tables(model: PreTrainedModelForAIM) -> Student:
    """The student's rows as tables."""
    embedding, weight = model.get_input_embeddings(), input_table(model)
    frozen_from = torch.full((len(weight),), -1, device=weight.device)
    if isinstance(embedding, PartlyFrozenEmbeddings):
        frozen_from = torch.arange(len(weight), device=weight.device).where(embedding.frozen_mask, frozen_from)
    table = EmbeddingTable(weight, frozen_from, weight)
    _check_forward(embedding, table)
    if not model.with_ntp:
        return Student(table)
    head = model.get_output_embeddings()
    output = None if model.tied else EmbeddingTable(head.weight, frozen_from, head.weight.detach())
    rule = logit_rule(model.causal_model)
    return Student(table, output, Head((output or table).weight(), getattr(head, "bias", None), **rule))


@torch.no_grad()
def _check_forward(embedding: torch.nn.Module, table: EmbeddingTable) -> None:
    """Training gives the module the rows of a batch as its `weight`; it must do with them what it does by itself."""
    ids = torch.cat([(table.slot < 0).nonzero()[:4, 0], table.trainable_ids[:4]])
    if not torch.equal(embed(embedding, table.rows(ids), ids), embedding(ids)):
        raise ValueError(
            f"student_model: wanted an embedding whose forward calls the one of PartlyFrozenEmbeddings or nn.Embedding "
            f"and has no other use for ids, got {type(embedding).__name__}, which does not embed the rows it is given"
        )


@torch.no_grad()
def write_back(student: Student, model: PreTrainedModelForAIM) -> None:
    """Put the tables' rows into the model's modules."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PartlyFrozenEmbeddings):
        embedding.active_embeddings.weight.copy_(student.input.trainable)
        embedding.unfreeze_active()
    else:
        embedding.weight.copy_(student.input.weight())
    if model.with_ntp:
        model.get_output_embeddings().weight.copy_(student.tables[-1].weight())
