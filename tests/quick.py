"""What the suite would work out again and again, kept: commands, pictures, and types of Triton's interpreter."""

import functools
from dataclasses import replace
from pathlib import Path

import typer.testing


def commands() -> None:
    """CliRunner builds all commands anew for each one that it runs: most of the time of a refused argument."""
    typer.testing._get_command = functools.cache(typer.testing._get_command)


def pictures() -> None:
    """Of the curves at the end of a run, which take a third of a tiny one: those of a kind are drawn once."""
    from matt_fast.report import curves

    figure_class, drawn = curves.figure_class, {}

    def drawn_once():
        class Figure(figure_class()):
            def savefig(self, picture, **options):
                legends = (axis.get_legend() for axis in self.axes)
                labels = [legend and [text.get_text() for text in legend.texts] for legend in legends]
                kind = str([(axis.get_ylabel(), axis.get_yscale()) for axis in self.axes] + labels)
                if kind not in drawn:
                    super().savefig(picture, **options)
                    drawn[kind] = Path(picture).read_bytes()
                Path(picture).write_bytes(drawn[kind])

        return Figure

    curves.figure_class = drawn_once


def interpreter() -> None:
    """Half of its time. Results are the same. Names below are Triton's own; one that is gone shows before any test."""
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
