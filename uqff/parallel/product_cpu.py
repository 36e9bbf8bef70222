"""Products on the CPU: by the kernels of :mod:`uqff.simd.decoding`, which decode a weight as they multiply with it.

Weights are as dequantised to float32, sums are float32, whatever the dtype of the activations; only the result is
rounded to it.  So a product is as exact as one of float32 numbers, but its bits depend on the CPU's vectors and on the
number of rows, as those of any BLAS do.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from uqff import simd
from uqff.families.part import Part
from uqff.parallel.weight import of_spec

if TYPE_CHECKING:
    from uqff.families import QuantizedTensor
    from uqff.simd.decoding import Decoding

__all__ = ["gather_linear", "linear", "linear_as_engine"]

MOST_ROWS: Final = {torch.float32: 128, torch.bfloat16: 32, torch.float16: 32}
"""Rows of activations above which a weight is dequantised as a whole, and BLAS multiplies.

Measured with q4_0 and q4k of 4096 x 4096, two cores (Zen 3): kernels take 0.1 to 0.9 of the time up to 64 float32 rows,
and as much from 256 on.  Of 16-bit numbers BLAS has faster products on other CPUs (AVX-512 BF16, AMX) than kernels of
float32 can have.
"""

MOST_AS_ENGINE: Final = 16
"""Rows of activations above which those of the engine's arithmetic are rounded first and then multiplied as floats."""

_KEPT: Final = 1 << 14
"""Weights whose decodings are kept: more than a model has."""

_decodings: dict[tuple[object, ...], Decoding | None] = {}
"""By specification and addresses.  They are views of memory that they do not keep alive: whoever asks for one brings
tensors that do."""
_records: dict[tuple[object, ...], QuantizedTensor | None] = {}
"""Likewise."""


def linear(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    count = math.prod(x.shape[:-1])
    decoding = _decoding(x, parts, spec, 2) if 0 < count <= MOST_ROWS.get(x.dtype, 0) else None
    if decoding is None:
        return None
    columns = x.shape[-1]
    y = np.empty((count, decoding.items * decoding.size // columns), np.float32)
    decoding.multiply(_floats(x), y)
    return _tensor(y, x, *x.shape[:-1])


def linear_as_engine(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    count = math.prod(x.shape[:-1])
    record = _record(x, parts, spec) if count and x.dtype in MOST_ROWS else None
    if record is None or record.engine_activations is None:
        return None
    given = _floats(x)
    if count > MOST_AS_ENGINE:
        rounded = record.rounded_as_engine(given)
        if rounded is not None:
            rows = torch.from_numpy(rounded).view(x.shape)
            y = linear(rows, parts, spec)
            return (torch.nn.functional.linear(rows, record.dequantize()) if y is None else y).to(x.dtype)
    made = record.multiply_as_engine(given)
    return None if made is None else _tensor(made, x, *x.shape[:-1])


def gather_linear(
    x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str
) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    decoding = _decoding(x, parts, spec, 3) if x.dtype in MOST_ROWS else None
    if decoding is None:
        return None
    (tokens, per_token), (experts, outputs, _) = indices.shape, of_spec(spec).shape
    given, chosen = _floats(x), indices.numpy().reshape(-1)
    counts = np.bincount(chosen, minlength=experts)
    if len(counts) > experts or counts.max() > MOST_ROWS[x.dtype]:
        return None
    y = np.empty((tokens * per_token, outputs), np.float32)
    places, at = np.argsort(chosen, kind="stable"), 0
    for expert in np.flatnonzero(counts).tolist():
        where = places[at : at + counts[expert]]
        at += len(where)
        made = np.empty((len(where), outputs), np.float32)
        rows = given[where if x.shape[1] == per_token else where // per_token]
        decoding.multiply(rows, made, expert * outputs, whole=False)
        y[where] = made
    return _tensor(y, x, tokens, per_token)


def _tensor(y: npt.NDArray[np.float32], x: torch.Tensor, *outer: int) -> torch.Tensor:
    """Results ``[..., out]`` in the dtype of the activations."""
    made = torch.from_numpy(y)
    if len(outer) != 1:
        made = made.view(*outer, y.shape[1])
    return made if x.dtype is torch.float32 else made.to(x.dtype)


def _floats(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """Activations as float32 ``[rows, in]``."""
    given = x.detach()
    if given.ndim != 2:
        given = given.reshape(-1, x.shape[-1])
    if given.dtype is not torch.float32 or not given.is_contiguous():
        given = given.to(torch.float32).contiguous()
    rows: npt.NDArray[np.float32] = given.numpy()
    return rows


def _record(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> QuantizedTensor | None:
    """The weight that ``x`` can be multiplied with and whose bytes these are, as views that do not keep them alive."""
    key = (spec, *((part.data_ptr(), part.numel(), part.is_contiguous()) for part in parts))
    if key not in _records:
        if len(_records) >= _KEPT:
            _records.clear()
        _records[key] = _viewed(parts, of_spec(spec))
    record = _records[key]
    if record is None or len(record.shape) != 2 or record.shape[1] != x.shape[-1]:
        return None
    return record


def _viewed(parts: Sequence[torch.Tensor], meta: QuantizedTensor) -> QuantizedTensor | None:
    """A record of views of the bytes of its parts."""
    if not all(part.is_contiguous() and part.dtype is torch.uint8 and part.is_cpu for part in parts):
        return None
    sizes = [part.nbytes for part in meta.parts.values()]
    if sizes != [part.numel() for part in parts]:
        return None
    views = {
        name: Part(part.dtype, part.shape, memoryview((ctypes.c_ubyte * size).from_address(data.data_ptr())))
        for (name, part), size, data in zip(meta.parts.items(), sizes, parts, strict=True)
    }
    return meta.replaced(**views)


def _decoding(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, dims: int) -> Decoding | None:
    """How a weight of so many dimensions is decoded, if kernels can multiply ``x`` with it."""
    if not simd.enabled():
        return None
    key = (spec, x.shape[-1], dims, *((part.data_ptr(), part.numel(), part.is_contiguous()) for part in parts))
    if key in _decodings:
        return _decodings[key]
    meta, made = of_spec(spec), None
    if len(meta.shape) == dims and x.shape[-1] == meta.shape[-1]:
        record = _viewed(parts, meta)
        made = None if record is None else record.decoding()
    if made is not None and not (made.fits(x.shape[-1]) and made.items * made.size == meta.numel):
        made = None
    if len(_decodings) >= _KEPT:
        _decodings.clear()
    _decodings[key] = made
    return made
