"""Memory and products of the torch engine's blocks."""

from math import prod

import torch

# Large products of bfloat16 inputs on a CPU go to oneDNN, in pieces of one shape: it compiles each shape anew. On this
# project's machines (AMD) it takes half of MKL's time. torch before 2.9 has no switch for it.
ONEDNN = getattr(torch.backends.mkldnn, "matmul", None)
PIECE = 1 << 17  # scores
BUFFERS = "teacher", "student", "tanh", "gradient", "states", "states of the other side"


class Workspace:
    """Buffers used again by every block: pages are touched once, and the peak is the widest block's.

    They are one piece of memory: glibc gives what is freed back to the system, and takes it page by page in the next
    step, until it has seen a piece as large.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, onednn=None):
        self.dtype, self.device, self.onednn = dtype, device, onednn
        self.elements, self.buffer = 0, torch.empty(0, dtype=dtype, device=device)

    def reserve(self, elements: int):
        """Buffers of at least this size; what was taken before is lost."""
        if self.elements < elements:
            self.elements, self.buffer = elements, None
            self.buffer = torch.empty(len(BUFFERS) * elements, dtype=self.dtype, device=self.device)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        start = BUFFERS.index(name) * self.elements
        return self.buffer[start : start + prod(shape)].view(shape)

    def pieces(self, count: int, size: int):
        """Slices of `count` columns, to be multiplied one by one: of `size` with oneDNN, the rest without.

        The products of inputs stay exact; a CPU with bfloat16 units may round the gradients' factors to bfloat16, as
        flash attention does, never the sums. The switch is the process's, not the thread's.
        """
        full = count - count % size if self.onednn else 0
        if full:
            before, self.onednn.fp32_precision = self.onednn.fp32_precision, "bf16"
            try:
                yield from (slice(start, start + size) for start in range(0, full, size))
            finally:
                self.onednn.fp32_precision = before
        if full < count:
            yield slice(full, count)
