"""What a process sends to others: every collective of torch.distributed, as PyTorch dispatches them."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts collectives.

    Sent are the bytes of the usual algorithms, over a ring of N processes: 2(N-1)/N of a tensor whose mean is taken,
    (N-1)/N of what was gathered in the end; of one process's tensor that all get, all of it.

    Attributes:
        sent: bytes by kind of operation.
        calls: number of them.
    """

    def __init__(self):
        super().__init__()
        self.sent, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function.namespace == "c10d":
            name, n = function._schema.name.removeprefix("c10d::"), torch.distributed.get_world_size()
            size = sum(x.nbytes for x in tree_leaves(arguments[0]) if isinstance(x, torch.Tensor))
            if name not in ("barrier", "monitored_barrier_"):
                share = {"allreduce_": 2 * (n - 1) / n, "broadcast_": 1.0, "scatter_": 1.0}.get(name, (n - 1) / n)
                self.sent[name] += round(size * share)
                self.calls[name] += 1
        return result
