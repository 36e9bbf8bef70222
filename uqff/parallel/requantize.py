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

Authority: mistral.rs v0.8.0, ``add_delta_w`` and ``apply_isq`` of each family in ``mistralrs-quant/src``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from uqff.codes import Family
from uqff.errors import ShapeError, UnsupportedError
from uqff.families import AFQ, GGUF, QuantizedTensor, Unquant
from uqff.families.fields import raw_bytes
from uqff.families.gguf.blocks import block_type_of_kind
from uqff.families.parts import Part
from uqff.quantization.types import kind_name, quantize

if TYPE_CHECKING:
    from uqff.quantization.types import Engine, Fallback

__all__ = ["act_type", "add_delta", "nominal_dtype", "requantize"]


def nominal_dtype(record: QuantizedTensor) -> torch.dtype:
    """The dtype that a layer of the family claims: of its scales or numbers; float32 for blocks, bfloat16 for MXFP4."""
    if record.family is Family.GGUF:
        return {"f16": torch.float16, "bf16": torch.bfloat16}.get(record.kind, torch.float32)
    if isinstance(record, Unquant):
        return record.dtype.torch
    if record.family is Family.FP8:
        return torch.float8_e4m3fn
    if record.family is Family.MXFP4:
        return torch.bfloat16
    scales = record._parts().get("scales")
    if scales is None:
        return torch.float32
    return scales.dtype.torch if isinstance(scales, Part) else scales.dtype


def act_type(record: QuantizedTensor) -> torch.dtype | None:
    """The dtype that activations are cast to by ``forward_autocast``; None if they stay as they are."""
    if record.family is Family.GGUF:
        return torch.float32
    return nominal_dtype(record) if record.family is Family.HQQ else None


def add_delta(record: QuantizedTensor, delta: torch.Tensor, *, engine: Engine) -> QuantizedTensor:
    """The weight plus a delta, as the same type.

    Args:
        record: the weight; not modified.
        delta: of the weight's shape.
        engine: whose quantiser.

    Raises:
        UnsupportedError: HQQ and MXFP4 cannot.
        ShapeError: the delta has another shape.
    """
    if record.family in (Family.HQQ, Family.MXFP4):
        raise UnsupportedError(f"{record.kind} weights take no delta", got=f"a delta {list(delta.shape)}")
    if tuple(delta.shape) != record.shape:
        raise ShapeError("delta does not fit the weight", expected=list(record.shape), got=list(delta.shape))
    delta = delta.detach().to(record.device)
    if isinstance(record, Unquant):
        return Unquant.of((record.weight + delta.to(record.weight.dtype)).contiguous())
    if isinstance(record, GGUF) and record.block_type.block_size == 1:
        plain = record.dequantize(nominal_dtype(record)) + delta.to(nominal_dtype(record))
        return GGUF(raw_bytes(plain), record.block_type)
    dtype = nominal_dtype(record) if isinstance(record, AFQ) else torch.float32
    total = (record.dequantize(dtype) + delta.to(dtype)).cpu()
    group_size = record.group_size if isinstance(record, AFQ) else None
    return quantize(total, record.kind, engine=engine, group_size=group_size, dtype=dtype).to(record.device)


def requantize(
    record: QuantizedTensor,
    kind: str | int | None,
    *,
    engine: Engine,
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
    family, ggml = record.family, block_type_of_kind(name) is not None
    allowed = {
        Family.GGUF: ggml or name == "f8q8",
        Family.UNQUANT: True,
        Family.HQQ: name in ("hqq4", "hqq8"),
        Family.FP8: name == "f8q8",
        Family.AFQ: name == "f8q8",
        Family.F8Q8: True,
        Family.MXFP4: False,
    }[family]
    if not allowed:
        raise UnsupportedError(f"{record.kind} weights are not requantised to {name}", layer=module)
    if family is Family.F8Q8 and name == "f8q8":
        return record
    dtype = nominal_dtype(record) if family in (Family.UNQUANT, Family.AFQ) else torch.float32
    plain = record.dequantize(dtype).cpu()
    return quantize(plain, name, engine=engine, module=module, on_fallback=on_fallback)
