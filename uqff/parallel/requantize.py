"""Changing a quantised weight: adding a delta to it, and giving it another type.

What is allowed differs per family::

                add a delta                     another type
    gguf        dequantise, add, quantise       any ggml type, f8q8
    unquant     add                             any
    hqq         no                              hqq4, hqq8
    fp8         dequantise, add, quantise       f8q8
    afq         dequantise, add, quantise       f8q8
    f8q8        dequantise, add, quantise       any
    mxfp4       no                              none
    foreign     no                              none

Authority: mistral.rs v0.8.0, ``add_delta_w`` and ``apply_isq`` of each family in ``mistralrs-quant/src``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from uqff.errors import ShapeError, UnsupportedError
from uqff.families import QuantizedTensor
from uqff.quantization.types import kind_name, quantize

if TYPE_CHECKING:
    from uqff.quantization.types import EffortName, Engine, Fallback

__all__ = ["add_delta", "requantize"]


def add_delta(record: QuantizedTensor, delta: torch.Tensor, *, engine: Engine) -> QuantizedTensor:
    """The weight plus a delta, as the same type.

    Args:
        record: the weight; not modified.
        delta: of the weight's shape.
        engine: whose quantiser.

    Raises:
        UnsupportedError: HQQ, MXFP4 and what UQFF has no form for cannot.
        ShapeError: the delta has another shape.
    """
    if not record.TAKES_DELTA:
        raise UnsupportedError(f"{record.kind} weights take no delta", got=f"a delta {list(delta.shape)}")
    if tuple(delta.shape) != record.shape:
        raise ShapeError("delta does not fit the weight", expected=list(record.shape), got=list(delta.shape))
    delta = delta.detach().to(record.device)
    summed = record.plus(delta)
    if summed is not None:
        return summed
    dtype = record.load_dtype.torch
    total = (record.dequantize(dtype) + delta.to(dtype)).cpu()
    made = quantize(total, record.kind, engine=engine, group_size=record.own_group_size, dtype=dtype)
    return made.to(record.device)


def requantize(
    record: QuantizedTensor,
    kind: str | int | None,
    *,
    engine: Engine,
    effort: EffortName = "engine",
    importance: Sequence[float] | torch.Tensor | None = None,
    on_fallback: Callable[[Fallback], None] | None = None,
    module: str | None = None,
) -> QuantizedTensor:
    """The weight as another type; the record itself if ``kind`` is None.

    The engine quantises a ggml weight once more where no type is asked for, and stops with "not yet implemented" where
    FP8 and AFQ are asked for anything but F8Q8; here the former is a plain copy and the latter an error.

    Raises:
        UnsupportedError: the family does not change into that type.
    """
    if kind is None:
        return record
    name = kind_name(kind)
    if not record.becomes(name):
        raise UnsupportedError(f"{record.kind} weights are not requantised to {name}", layer=module)
    if record.STAYS and name == record.kind:
        return record
    dtype = record.load_dtype.torch
    plain = record.dequantize(dtype).cpu()
    return quantize(
        plain, name, engine=engine, effort=effort, importance=importance, module=module, on_fallback=on_fallback
    )
