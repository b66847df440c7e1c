"""The update of embedding rows by torch operations, counted as they run, beside that of the kernel."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matt_fast.model.embeddings import RowAdamW

UPDATE_BYTES = 28  # of a row's element by adamw_rows_kernel: reads row, gradient and both moments, writes all but one


class Moved(TorchDispatchMode):
    """Counts the operations inside it that move data, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            given = arguments[1:] if "index_put" in function.name() else arguments  # which overwrites its first
            read = {id(x): x for x in tree_leaves((given, options))}.values()
            tensors = [x for x in (*read, *tree_leaves(result)) if isinstance(x, torch.Tensor)]
            self.operations += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def update_cost(rows: int, hidden: int) -> tuple[int, int]:
    """Operations and bytes of a lazy update by torch operations, of a table that has no more rows than the step."""
    table, gradient = (torch.empty(rows, hidden, device="meta") for _ in range(2))
    side = RowAdamW(table, 0.1, backend="torch")
    with Moved() as moved:
        side.step(torch.empty(rows, dtype=torch.int64, device="meta"), gradient)
    return moved.operations, moved.bytes
