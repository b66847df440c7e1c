"""An embedding whose rows are partly frozen, as two tables."""

import torch
from torch import nn
from torch.nn import functional as F


class PartlyFrozenEmbeddings(nn.Module):
    """Frozen and trainable rows of an embedding in tables of their own, after the reference library's class.

    Looks rows up and nothing else; an architecture whose embedding does more (a scale) has a subclass with a `forward`
    of its own around this one.

    Args:
        embeddings: [vocabulary, dim], split by copying.
        frozen_mask: [vocabulary or fewer] bool, True for frozen rows; rows beyond its end are trainable.

    Attributes:
        vocab_size, embedding_dim: of `embeddings`.
        frozen_embeddings, active_embeddings: nn.Embedding with the rows of either kind, in the order of their ids.
        frozen_mask, active_mask: [vocabulary] bool.
        places: [vocabulary] int64, where an id stands in its table.

    Raises:
        TypeError: the mask is no bool tensor.
        ValueError: it is not a vector, or longer than the table.
    """

    def __init__(self, embeddings: nn.Embedding, frozen_mask: torch.Tensor):
        super().__init__()
        weight = embeddings.weight.detach()
        if not isinstance(frozen_mask, torch.Tensor) or frozen_mask.dtype != torch.bool:
            kind = getattr(frozen_mask, "dtype", type(frozen_mask).__name__)
            raise TypeError(f"frozen_mask: wanted a bool tensor, got {kind}")
        if frozen_mask.ndim != 1 or len(frozen_mask) > len(weight):
            raise ValueError(
                f"frozen_mask: wanted one entry for each of at most {len(weight)} rows of the embedding, "
                f"got shape {tuple(frozen_mask.shape)}; a new tokenizer needs a resized table first"
            )
        frozen_mask = F.pad(frozen_mask.to(weight.device), (0, len(weight) - len(frozen_mask)))
        self.vocab_size, self.embedding_dim = weight.shape
        self.padding_idx = embeddings.padding_idx
        self.frozen_embeddings = nn.Embedding.from_pretrained(weight[frozen_mask], freeze=True)
        self.active_embeddings = nn.Embedding.from_pretrained(weight[~frozen_mask], freeze=False)
        self.register_buffer("frozen_mask", frozen_mask)
        self.register_buffer("active_mask", ~frozen_mask)
        self.register_buffer("places", torch.where(frozen_mask, frozen_mask.cumsum(0), (~frozen_mask).cumsum(0)) - 1)
        self.register_buffer("weight", None)  # a table that torch.func.functional_call puts in place of both

    def freeze_all(self) -> None:
        """Let no row be trained."""
        self.active_embeddings.requires_grad_(False)

    def unfreeze_active(self) -> None:
        """Let the rows outside the mask be trained."""
        self.active_embeddings.requires_grad_(True)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[*shape of input_ids, dim]; `input_ids` are int64 ids of the whole vocabulary."""
        if self.weight is not None:
            return F.embedding(input_ids, self.weight)
        frozen, place = self.frozen_mask[input_ids], self.places[input_ids]
        rows = self.active_embeddings.weight.new_empty(*input_ids.shape, self.embedding_dim)
        rows[frozen] = self.frozen_embeddings(place[frozen])
        rows[~frozen] = self.active_embeddings(place[~frozen])
        return rows

    def to_embeddings(self) -> nn.Embedding:
        """One table again: [vocabulary, dim] in the original's dtype, without any scale."""
        weight = self.active_embeddings.weight.new_empty(self.vocab_size, self.embedding_dim)
        weight[self.frozen_mask] = self.frozen_embeddings.weight.detach()
        weight[self.active_mask] = self.active_embeddings.weight.detach()
        return nn.Embedding.from_pretrained(weight.detach(), freeze=False, padding_idx=self.padding_idx)


class Gemma3TextScaledPartlyFrozenWordEmbedding(PartlyFrozenEmbeddings):
    """The same for Gemma, which multiplies embeddings by `embed_scale` when it runs; rows are stored without it.

    Args:
        embeddings, frozen_mask: as `PartlyFrozenEmbeddings`.
        embed_scale: the factor, rounded to the rows' dtype as Gemma does.
    """

    def __init__(self, embeddings: nn.Embedding, frozen_mask: torch.Tensor, embed_scale: float | torch.Tensor = 1.0):
        super().__init__(embeddings, frozen_mask)
        self.embed_scale = float(embed_scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As `PartlyFrozenEmbeddings.forward`, times the scale."""
        rows = super().forward(input_ids)
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype, device=rows.device)
