"""A memory sanitizer for Triton kernels in the interpreter: every access in bounds, every element owned by one program.

triton-viz checks accesses symbolically, but not through data-dependent ranges as ours; here each address is looked at.
"""

import numpy as np
from triton import knobs
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    pass


def install(monkeypatch) -> None:
    """Until the test ends, a load or store outside the tensors of its launch raises (as an InterpreterError). On a GPU
    nothing is looked at: there compute-sanitizer does it."""
    if not knobs.runtime.interpret:
        return
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    ranges, owners = [], {}

    def prepared(self, arguments, keywords):
        values = prepare(self, arguments, keywords)
        tensors = [x for x in (*values[0], *values[1].values()) if hasattr(x, "data_ptr")]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + _extent(x) * x.element_size()) for x in tensors]
        owners.clear()
        return values

    def check(pointers, mask, what):
        addresses = np.asarray(pointers.data)[np.asarray(mask.data)].astype(np.int64).ravel()
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(len(addresses), bool)
        for low, high in ranges:
            inside |= (addresses >= low) & (addresses + size <= high)
        if not inside.all():
            raise OutOfBounds(f"{what} outside of every tensor of the launch: {addresses[~inside][:4]}, {ranges}")
        return addresses

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        program = tuple(self.grid_idx)
        for address in check(pointers, mask, "store").tolist():
            if owners.setdefault(address, program) != program:
                raise OutOfBounds(f"programs {owners[address]} and {program} store to one element")
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "_init_args_hst", prepared)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def _extent(x) -> int:
    """Elements from the first to the last one that strides reach."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
