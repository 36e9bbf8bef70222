"""Small arrays on a kernel's stack, for what it keeps between its loops.

``np.empty`` in a kernel brings an allocator, reference counts and the code for running out of memory, all of which are
compiled again for every dtype and number of dimensions.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types

from uqff.simd.vectors import intrinsic, signature

__all__ = ["scratch", "scratch_rows"]

_LINE = 64
"""Bytes of a cache line, to which they are aligned."""


def _array(result: Any, shape: tuple[int, ...]) -> Any:
    def generate(context: Any, builder: Any, _sig: Any, _args: Any) -> Any:
        element = context.get_data_type(result.dtype)
        # numba's own way fills it with zeros: at each call, and LLVM takes seconds to find what that is good for.
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(element, math.prod(shape)))
        memory.align = _LINE
        itemsize = context.get_abi_sizeof(element)
        strides = [itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
        array = context.make_array(result)(context, builder)
        context.populate_array(
            array,
            data=builder.bitcast(memory, array.data.type),
            shape=[context.get_constant(types.intp, size) for size in shape],
            strides=[context.get_constant(types.intp, stride) for stride in strides],
            itemsize=context.get_constant(types.intp, itemsize),
            meminfo=None,
        )
        return array._getvalue()

    return generate


@intrinsic
def scratch(_typing: Any, size: Any, dtype: Any) -> Any:
    """``np.empty(size, dtype)``, of a constant size. It ends with the function that asks for it: none may return it."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    result = types.Array(dtype.dtype, 1, "C")
    return signature(result, size, dtype), _array(result, (size.literal_value,))


@intrinsic
def scratch_rows(_typing: Any, rows: Any, size: Any, dtype: Any) -> Any:
    """``np.empty((rows, size), dtype)``: see :func:`scratch`."""
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(size, types.IntegerLiteral):
        return None
    result = types.Array(dtype.dtype, 2, "C")
    return signature(result, rows, size, dtype), _array(result, (rows.literal_value, size.literal_value))
