"""Triton's interpreter as the tests use it: quicker, and with a GPU's rounding."""

from collections.abc import Callable
from typing import Any


def patch_the_language_once() -> None:
    """Triton's interpreter patches its language at every call of a function, though the launch has patched it already.

    Else that takes a third of the time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, nothing_to_restore = interpreter._patch_lang, interpreter._LangPatchScope()

    def patch_what_is_not(function: Callable[..., object]) -> Any:
        seen = [m for m in function.__globals__.values() if m is language or m is language.core]
        is_patched = not any(language.core.is_builtin(m.load) for m in seen)
        return nothing_to_restore if is_patched else patch(function)

    interpreter._patch_lang = patch_what_is_not


def round_to_nearest() -> None:
    """What becomes bfloat16 is rounded to nearest, as on a GPU; the interpreter cuts it off."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(numbers: Any, of: Any, to: Any, mode: Any) -> Any:
        if of != tl.float32 or to != tl.bfloat16 or mode is not None:
            return convert(numbers, of, to, mode)
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        up = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(numbers), 0x7FC0, up).astype(np.uint16)

    interpreter._convert_float = rounded


def add_up_products_alike() -> None:
    """Every sum of a product runs over the depth in one way, as on a GPU: equal columns give equal bits.

    The interpreter asks numpy's BLAS, whose kernels for some CPUs round differently at the edges of their own tiles.
    """
    import numpy as np
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.einsum("...ij,...jk->...ik", a.data, b.data, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
