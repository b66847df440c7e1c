"""What the suite would work out again and again, kept: commands, and types of Triton's interpreter."""

import functools
from dataclasses import replace
from importlib.metadata import version

import typer.testing

TRITON = "3.9."  # what this was tried with


def commands() -> None:
    """CliRunner builds all commands anew for each one that it runs: most of the time of a refused argument."""
    typer.testing._get_command = functools.cache(typer.testing._get_command)


def interpreter() -> None:
    """Half of its time, with the same results. Names below are Triton's own: of other versions nothing is touched."""
    if not version("triton").startswith(TRITON):
        return
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    # It adds 64-bit integers beside all of 32 bits, and drops what it finds: assertions are on with `debug` alone.
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    numpy_type, block, tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    broadcast = TritonSemantic.broadcast_impl_value
    numpy_types, blocks, tensors = {}, {}, {}

    def numpy_type_once(kind):
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    def block_once(self, element_type, shape):
        key = element_type.name, *shape
        if key not in blocks:
            block(self, element_type, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def tensor_once(self, handle, kind):
        if kind.name not in tensors:
            tensor(self, handle, kind)
            tensors[kind.name] = vars(self).copy()
        vars(self).update(tensors[kind.name], handle=handle)

    def broadcast_others(self, left, right):
        kinds = left.type, right.type
        if all(x.is_block() for x in kinds) and kinds[0].shape.values == kinds[1].shape.values:
            return left, right
        return broadcast(self, left, right)

    interpreter._get_np_dtype = numpy_type_once
    core.block_type.__init__ = block_once
    core.tensor.__init__ = tensor_once
    TritonSemantic.broadcast_impl_value = broadcast_others
