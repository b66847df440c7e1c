"""What `MATT.train` returns."""

import torch
from transformers import PreTrainedModel


class MATTOutput(torch.Tensor):
    """What `MATT.train` returns: the learned input embeddings, with the output embeddings beside them.

    It is the tensor of the input embeddings itself, so that both of the reference library's conventions work:
    `output.apply_to(model)`, and `model.get_input_embeddings().weight.data.copy_(output)`.

    Attributes:
        input_embeddings: [student rows, dim], on the CPU.
        output_embeddings: [student rows, dim], the head's; None unless trained with `with_ntp`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is a plain tensor

    def __new__(cls, input_embeddings: torch.Tensor, output_embeddings: torch.Tensor | None = None):
        return input_embeddings.detach().as_subclass(cls)

    def __init__(self, input_embeddings: torch.Tensor, output_embeddings: torch.Tensor | None = None):
        self.input_embeddings, self.output_embeddings = input_embeddings.detach(), output_embeddings

    def __deepcopy__(self, memo) -> "MATTOutput":
        return MATTOutput(*(None if x is None else x.clone() for x in (self.input_embeddings, self.output_embeddings)))

    def apply_to(self, model: PreTrainedModel) -> None:
        """Copy the learned embeddings into a whole model, in place.

        Raises:
            ValueError: one of the model's tables has another shape, or it has one table and two were learned; nothing
                has been changed then.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables = [("input", embedding, self.input_embeddings)]
        if self.output_embeddings is not None and head is not None:
            tables.append(("output", head, self.output_embeddings))
        for name, module, rows in tables:
            if module.weight.shape != rows.shape:
                raise ValueError(
                    f"model: wanted {name} embeddings of shape {tuple(rows.shape)}, got {tuple(module.weight.shape)}; "
                    "resize_token_embeddings first"
                )
        if len(tables) == 2 and head.weight is embedding.weight and not torch.equal(tables[0][2], tables[1][2]):
            raise ValueError(
                "model: wanted one whose output head has rows of its own, got one where it is tied to the input "
                "embeddings: it cannot hold both tables that were learned"
            )
        with torch.no_grad():
            for _, module, rows in tables:
                module.weight.copy_(rows)
