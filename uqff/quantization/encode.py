"""From a plain weight to a family's record: rounding, the check for numbers that are not finite, kernel or reference.

A quantiser takes finite float32 and returns numpy arrays; every family has one in :mod:`uqff.families` (the reference)
and one in :mod:`uqff.simd` (the fast twin, bit-equal to it).  Types whose blocks or groups are independent of each
other are made run by run, so that of a float16 or bfloat16 weight no float32 copy exists as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import FormatError
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, Unquant
from uqff.families.encoded import Encoded
from uqff.families.f8q8 import tensor as f8q8
from uqff.families.fields import array_fields, planned_fields
from uqff.families.gguf.blocks import BlockType, block_type_of_kind
from uqff.families.hqq.tensor import word_dtype
from uqff.families.mxfp4 import tensor as mxfp4
from uqff.numerics.floats import Floats
from uqff.numerics.packing import PLANES
from uqff.schema.bricks import Placeholder

__all__ = ["AFQ_BITS", "HQQ_BITS", "HQQ_STEPS", "Loaded", "encode", "planned", "widened"]

F32: TypeAlias = npt.NDArray[np.float32]

AFQ_BITS: Final = {"afq2": 2, "afq3": 3, "afq4": 4, "afq6": 6, "afq8": 8}
HQQ_BITS: Final = {"hqq1": 1, "hqq2": 2, "hqq3": 3, "hqq4": 4, "hqq8": 8}

HQQ_STEPS: Final = 10
"""Turns of HQQ's optimiser, as the engine has them."""

TILE: Final = 1 << 21
"""Weights that are rounded, widened and quantised together; a multiple of all sizes of blocks and groups."""

REFERENCE_BLOCKS: Final = 1 << 12
"""Blocks that a reference quantiser of ggml's types gets together: it needs some 50 bytes per weight."""


class Loaded:
    """A weight as a loader sees it: rounded to the load dtype (to nearest, ties to even), checked, widened when needed.

    Attributes:
        weight: the weight as it was given.
        dtype: the load dtype.
        shape: of the weight.
    """

    def __init__(self, weight: Floats, dtype: DType, scratch: F32 | None = None) -> None:
        """Nothing is done yet.

        Args:
            weight: the numbers, of any strides.
            dtype: the load dtype: F32, F16 or BF16.
            scratch: memory for :attr:`values`, at least as many elements as the weight has; new memory if None.
        """
        self.weight = weight
        self.dtype = dtype
        self.shape = weight.shape
        self._scratch = scratch

    @cached_property
    def plain(self) -> Floats:
        """The weight in its load dtype, C-contiguous; shares memory with the given one if that is both.

        Raises:
            FormatError: a weight is not finite in that dtype; its position is named.
        """
        plain = self.weight.cast(self.dtype, payloads=False)
        _check_finite(plain, 0, self.shape)
        return plain

    @cached_property
    def values(self) -> F32:
        """The weight in its load dtype, widened to float32, C-contiguous; shares memory if the given one is that.

        Raises:
            FormatError: a weight is not finite in the load dtype; its position is named.
        """
        if self._is_float32:
            return self.plain.bits.view(np.float32)
        wide = self._floats(math.prod(self.shape))
        for at in range(0, len(wide), TILE):
            self._widen(at, wide[at : at + TILE])
        return wide.reshape(self.shape)

    def runs(self) -> Iterator[F32]:
        """:attr:`values`, flat, in runs of :data:`TILE` and a rest; each is gone when the next is asked for.

        Raises:
            FormatError: as for :attr:`values`.
        """
        count = math.prod(self.shape)
        if self._is_float32 or "values" in self.__dict__ or count <= TILE:
            yield self.values.reshape(-1)
            return
        wide = self._floats(TILE)
        for at in range(0, count, TILE):
            run = wide[: count - at]
            self._widen(at, run)
            yield run

    @property
    def _is_float32(self) -> bool:
        return self.dtype is self.weight.dtype is DType.F32

    def _widen(self, start: int, out: F32) -> None:
        """Write the weights from ``start`` on."""
        if self.dtype is self.weight.dtype:
            run = self.plain.flat[start : start + len(out)]
        else:
            run = self._flat[start : start + len(out)].cast(self.dtype, payloads=False)
            _check_finite(run, start, self.shape)
        run.cast_into(Floats(out.view(np.uint32), DType.F32), payloads=False)

    @cached_property
    def _flat(self) -> Floats:
        return self.weight.flat

    def _floats(self, count: int) -> F32:
        return np.empty(count, np.float32) if self._scratch is None else self._scratch[:count]


def widened(kind: str, weights: int) -> int:
    """How many of a weight's numbers are float32 at one time while :func:`encode` makes a type of them."""
    if kind == "unquant":
        return 0
    return weights if kind in HQQ_BITS or kind == "fp8" else min(weights, TILE)


def encode(loaded: Loaded, kind: str, *, engine: str, group_size: int = 64) -> Encoded:
    """A weight whose shape fits the type, quantised; does not import torch.

    Args:
        loaded: the weight.
        kind: a type's name as :func:`uqff.quantization.types.plan` returns it.
        engine: generation; decides the code of Q8K's largest element.
        group_size: of AFQ or HQQ.

    Raises:
        FormatError: a weight is not finite in its load dtype; its position is named.
    """
    return _encoded(kind, loaded.shape, _parts(loaded, kind, engine, group_size), group_size)


def planned(kind: str, shape: tuple[int, ...], dtype: DType, group_size: int = 64) -> Encoded:
    """What :func:`encode` will make, without payload.

    Args:
        kind: as there.
        shape: of the weight.
        dtype: the load dtype.
        group_size: of AFQ or HQQ.
    """
    return _encoded(kind, shape, _planned_parts(kind, shape, dtype, group_size), group_size)


def _encoded(kind: str, shape: tuple[int, ...], parts: Sequence[Any], group_size: int) -> Encoded:
    """A weight of its parts: tensor records, or payloads where a family has no more."""
    block_type = block_type_of_kind(kind)
    if block_type is not None:
        return Encoded(GGUF, {"ggml_dtype": block_type, "shape": shape, "data": parts[0]})
    if kind in AFQ_BITS:
        fields = dict(zip(("w_q", "scales", "biases"), parts, strict=True))
        return Encoded(AFQ, {**fields, "bits": AFQ_BITS[kind], "group_size": group_size})
    if kind in HQQ_BITS:
        fields = dict(zip(("w_q", "scales", "zeros"), parts, strict=True))
        options = {"axis": 0, "optimization_steps": HQQ_STEPS, "round_zeros": 0, "channel_wise": 1}
        return Encoded(HQQ, {**fields, "shape": shape, "bits": HQQ_BITS[kind], "group_size": group_size, **options})
    if kind == "fp8":
        fields = dict(zip(("weight", "dequant_w_scale", "quant_scale"), parts, strict=True))
        return Encoded(FP8, {**fields, "dequant_x_scale": fields["dequant_w_scale"], "dtype": DType.F8E4M3.code})
    if kind == "f8q8":
        return Encoded(F8Q8, {"shape": shape, "data": parts[0]})
    if kind == "mxfp4":
        return Encoded(MXFP4, dict(zip(("blocks", "scales"), parts, strict=True)))
    return Encoded(Unquant, {"weight": parts[0]})


def _parts(loaded: Loaded, kind: str, engine: str, group_size: int) -> Sequence[Any]:
    shape, block_type = loaded.shape, block_type_of_kind(kind)
    if block_type is not None:
        size, at = block_type.block_size, 0
        blocks = np.empty((math.prod(shape) // size, block_type.type_size), np.uint8)
        for run in loaded.runs():
            some = blocks[at : at + len(run) // size]
            _put_blocks(run.reshape(-1, size), block_type, engine, some)
            at += len(some)
        return [blocks.reshape(-1).data]
    if kind in AFQ_BITS:
        bits, quantize = AFQ_BITS[kind], _quantizer("afq")
        parts = _by_runs(loaded, group_size, lambda run: quantize(run.reshape(-1, group_size), bits, group_size))
        codes, *floats = (_rows(part, shape, group_size) for part in parts)
        rounded = (Floats(each.view(np.uint32), DType.F32).cast(loaded.dtype) for each in floats)
        return [array_fields(codes.view("<u4"), DType.U32), *(each.fields() for each in rounded)]
    if kind in HQQ_BITS:
        dtypes = (word_dtype(HQQ_BITS[kind]), DType.F32, DType.F32)
        return list(map(array_fields, _quantizer("hqq")(loaded.values, HQQ_BITS[kind], group_size, HQQ_STEPS), dtypes))
    if kind == "fp8":
        codes, *scales = _quantizer("fp8")(loaded.values)
        return [array_fields(codes, DType.F8E4M3), *(np.asarray(scale, "<f4").reshape(1).data for scale in scales)]
    if kind == "f8q8":
        quantize = _quantizer("f8q8")
        (blocks,) = _by_runs(loaded, f8q8.BLOCK_SIZE, lambda run: (quantize(run),))
        return [blocks.reshape(-1).data]
    if kind == "mxfp4":
        size, quantize = mxfp4.BLOCK_SIZE, _quantizer("mxfp4")
        parts = _by_runs(loaded, size, lambda run: quantize(run.reshape(-1, size)))
        return [array_fields(_rows(part, shape, size), DType.U8) for part in parts]
    return [loaded.plain.fields()]


def _planned_parts(kind: str, shape: tuple[int, ...], dtype: DType, group_size: int) -> Sequence[Any]:
    *outer, last = shape
    size, block_type = math.prod(shape), block_type_of_kind(kind)
    if block_type is not None:
        return [Placeholder(size // block_type.block_size * block_type.type_size)]
    if kind in AFQ_BITS:
        scales = planned_fields((*outer, last // group_size), dtype)
        return [planned_fields((*outer, last * AFQ_BITS[kind] // 32), DType.U32), scales, scales]
    if kind in HQQ_BITS:
        bits, columns = HQQ_BITS[kind], size // group_size
        scales = planned_fields((1, columns), DType.F32)
        return [planned_fields((-(-group_size // PLANES[bits]), columns), word_dtype(bits)), scales, scales]
    if kind == "fp8":
        return [planned_fields(shape, DType.F8E4M3), Placeholder(4), Placeholder(4)]
    if kind == "f8q8":
        return [Placeholder(-(-size // f8q8.BLOCK_SIZE) * f8q8.BLOCK.fixed_size)]
    if kind == "mxfp4":
        return [planned_fields((*outer, last // n), DType.U8) for n in (2, mxfp4.BLOCK_SIZE)]
    return [planned_fields(shape, dtype)]


def _by_runs(
    loaded: Loaded, size: int, quantize: Callable[[F32], tuple[npt.NDArray[Any], ...]]
) -> tuple[npt.NDArray[Any], ...]:
    """Arrays ``[ceil(weights / size), ...]`` out of those that ``quantize`` makes of every run."""
    count = -(-math.prod(loaded.shape) // size)
    whole: tuple[npt.NDArray[Any], ...] | None = None
    at = 0
    for run in loaded.runs():
        parts = quantize(run)
        if len(parts[0]) == count:
            return parts
        if whole is None:
            whole = tuple(np.empty((count, *part.shape[1:]), part.dtype) for part in parts)
        for array, part in zip(whole, parts, strict=True):
            array[at : at + len(part)] = part
        at += len(parts[0])
    assert whole is not None
    return whole


def _rows(array: npt.NDArray[Any], shape: tuple[int, ...], size: int) -> npt.NDArray[Any]:
    """What is ``[n, m]``, a row for every ``size`` weights, as ``[..., in / size * m]``."""
    *outer, columns = shape
    return array.reshape(*outer, columns // size * array.shape[1])


def _check_finite(run: Floats, start: int, shape: tuple[int, ...]) -> None:
    """Refuse a run of weights that begins at element ``start`` of a weight of that shape."""
    if run.is_finite:
        return
    first = run.first_not_finite()
    position = tuple(int(i) for i in np.unravel_index(start + first, shape))
    value = run.flat[first : first + 1].cast(DType.F32).bits.view(np.float32)[0]
    raise FormatError("weight is not finite", field="weight", expected="finite numbers", got=f"{value} at {position}")


def _kernels_enabled() -> bool:
    from uqff import simd

    return simd.enabled()


def _quantizer(family: str) -> Any:
    """The quantiser of a family other than ggml's."""
    room = "cpu_quantize" if _kernels_enabled() else "tensor"
    return import_module(f"uqff.families.{family}.{room}").quantize


def _put_blocks(values: F32, block_type: BlockType, engine: str, out: npt.NDArray[np.uint8]) -> None:
    """Blocks, uint8 ``[n, type_size]``, of float32 ``[n, block_size]``."""
    if block_type.block_size == 1:
        out[:] = values.astype("<f4", copy=False).view(np.uint8)
        return
    extreme = -127 if engine == "0.9" else -128
    if _kernels_enabled():
        from uqff.families.gguf import cpu_quantize as gguf_quantize

        gguf_quantize.quantize(block_type.name, values, extreme=extreme, out=out)
        return
    from uqff.families.gguf.reference_quantize import QUANTIZERS

    arguments = (extreme,) if block_type.name == "Q8K" else ()
    for at in range(0, len(values), REFERENCE_BLOCKS):
        part = values[at : at + REFERENCE_BLOCKS]
        out[at : at + REFERENCE_BLOCKS] = QUANTIZERS[block_type.name](part, *arguments)
