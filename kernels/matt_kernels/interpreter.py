"""Triton's interpreter (3.9), mended where TRITON_INTERPRET=1.

bfloat16: tl.dot multiplies the bit patterns as integers, and casts truncate. Kernels then compute what a GPU does,
products summed in float32 and casts rounded to nearest even.
Time: every call of a function inside a kernel replaces all of triton.language again, a third of the time and more.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "has_bfloat16", False):
        return
    plain_dot, plain_cast, plain_conversion = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, *rest):
        return plain_dot(self, *(_to_float32(x) for x in (a, b)), *rest)

    def cast_impl(self, source, target):
        rounded = _to_bfloat16(source, target)
        return plain_cast(self, source, target) if rounded is None else rounded

    def create_fp_to_fp(self, source, target, rounding_mode):
        rounded = _to_bfloat16(source, target)
        return plain_conversion(self, source, target, rounding_mode) if rounded is None else rounded

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    builder.has_bfloat16 = True


def patch_once() -> None:
    """Inside a launch triton.language is replaced once for each set of its modules that functions see."""
    plain = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if plain is None or scope is None or getattr(scope, "patches_once", False):
        return
    done, seen, restore = set(), {}, scope.restore

    def patch_lang(fn):
        if fn not in seen:
            seen[fn] = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if done and seen[fn] in done:
            return scope()
        done.add(seen[fn])
        return plain(fn)

    def restore_all(self):
        done.clear()  # the end of a launch: nothing else restores
        restore(self)

    interpreter._patch_lang, scope.restore, scope.patches_once = patch_lang, restore_all, True


def _to_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _to_bfloat16(source, target):
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return None
    bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(source.data), 0x7FC0, rounded)
    return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
