"""The shared tensor record R: a plain tensor with its dtype and shape, used for parts and biases.

::

    u32 length | u32 dtype | u32 ndim | u32 × ndim shape | data, row major, little endian

Authority: mistral.rs, ``mistralrs-quant/src/utils/uqff.rs`` (``serialize_tensor``, ``deserialize_tensor``).
"""

from __future__ import annotations

import math
from typing import Any

from uqff.codes import DType
from uqff.schema.bricks import U32, Checked, Derived, Dims, Span, Violation
from uqff.schema.layout import Layout

__all__ = ["TENSOR"]


def _decode_dtype(code: int) -> DType:
    dtype = DType.of_code(code)
    if dtype is None:
        raise Violation("unknown dtype", rule="BLOB-10", expected=f"a code from 0 to {len(DType) - 1}", got=code)
    if not dtype.storable:
        raise Violation("dtype is a reserved name that no tensor can have", rule="BLOB-11", got=f"{code} {dtype.name}")
    return dtype


def _payload_bytes(tensor: Any) -> int:
    size: int = math.prod(tensor["shape"]) * tensor["dtype"].itemsize
    return size


TENSOR = Layout(
    "length" / Derived(U32, _payload_bytes) * "bytes of `data`: ∏`shape` × itemsize(`dtype`)",
    "dtype" / Checked(U32, _decode_dtype, lambda dtype: dtype.code) * "dtype code",
    "ndim" / Derived(U32, lambda tensor: len(tensor["shape"])) * "number of dimensions",
    "shape" / Dims("ndim") * "dimensions in elements, outermost first",
    "data" / Span(_payload_bytes, "length", declared="length") * "elements, row major, little endian",
    label="R",
)
