"""An embedding whose rows are partly frozen, as two tables."""

import copy

import torch
from torch import nn
from torch.func import functional_call


class PartlyFrozenEmbeddings(nn.Module):
    """Frozen and trainable rows of an embedding in tables of their own, after the reference library's class.

    A scale that the embedding applies when it runs (Gemma) is applied here too, and is not part of any row.

    Args:
        embeddings: [vocabulary, dim], split by copying.
        frozen_mask: [vocabulary or fewer] bool, True for frozen rows; rows beyond its end are trainable.

    Attributes:
        vocab_size, embedding_dim: of `embeddings`.
        frozen_embeddings, active_embeddings: nn.Embedding with the rows of either kind, in the order of their ids.
        frozen_mask, active_mask: [vocabulary] bool.

    Raises:
        TypeError: the mask is not bool.
        ValueError: it is not a vector, or longer than the table.
    """

    def __init__(self, embeddings: nn.Embedding, frozen_mask: torch.Tensor):
        super().__init__()
        weight = embeddings.weight.detach()
        if frozen_mask.dtype != torch.bool:
            raise TypeError(f"frozen_mask: wanted a bool tensor, got {frozen_mask.dtype}")
        if frozen_mask.ndim != 1 or len(frozen_mask) > len(weight):
            raise ValueError(
                f"frozen_mask: wanted one entry for each of at most {len(weight)} rows of the embedding, "
                f"got shape {tuple(frozen_mask.shape)}; a new tokenizer needs a resized table first"
            )
        frozen_mask = nn.functional.pad(frozen_mask.to(weight.device), (0, len(weight) - len(frozen_mask)))
        self.vocab_size, self.embedding_dim = weight.shape
        self.padding_idx = embeddings.padding_idx
        self.frozen_embeddings = nn.Embedding.from_pretrained(weight[frozen_mask].clone(), freeze=True)
        self.active_embeddings = nn.Embedding.from_pretrained(weight[~frozen_mask].clone(), freeze=False)
        self.register_buffer("frozen_mask", frozen_mask)
        self.register_buffer("active_mask", ~frozen_mask)
        places = torch.where(frozen_mask, frozen_mask.cumsum(0), (~frozen_mask).cumsum(0)) - 1
        self.register_buffer("places", places)  # of each id, in its table
        plain = copy.copy(embeddings)
        plain._parameters = {"weight": nn.Parameter(weight.to("meta"), requires_grad=False)}
        plain.padding_idx = None
        self._plain = (plain,)  # in a tuple, so that it is no part of this module

    def freeze_all(self) -> None:
        """Let no row be trained."""
        self.active_embeddings.requires_grad_(False)

    def unfreeze_active(self) -> None:
        """Let the rows outside the mask be trained."""
        self.active_embeddings.requires_grad_(True)

    def without_rows(self) -> nn.Module:
        """The original module with a weight on the meta device: for `torch.func.functional_call` with other rows."""
        return self._plain[0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[*shape of input_ids, dim]; `input_ids` are int64 ids of the whole vocabulary."""
        flat = input_ids.flatten()
        frozen, place = self.frozen_mask[flat], self.places[flat]
        rows = self.active_embeddings.weight.new_empty(len(flat), self.embedding_dim)
        rows = rows.index_put((frozen,), self.frozen_embeddings(place[frozen]))
        rows = rows.index_put((~frozen,), self.active_embeddings(place[~frozen]))
        positions = torch.arange(len(flat), device=flat.device).view(input_ids.shape)
        return functional_call(self.without_rows(), {"weight": rows}, (positions,))

    def to_embeddings(self) -> nn.Embedding:
        """One table again: [vocabulary, dim] in the original's dtype, without its scale."""
        weight = self.active_embeddings.weight.new_empty(self.vocab_size, self.embedding_dim)
        weight[self.frozen_mask] = self.frozen_embeddings.weight.detach()
        weight[self.active_mask] = self.active_embeddings.weight.detach()
        return nn.Embedding.from_pretrained(weight.detach(), freeze=False, padding_idx=self.padding_idx)
