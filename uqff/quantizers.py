"""From a plain weight to a family's record: rounding, the check for numbers that are not finite, kernel or reference.

A quantiser takes finite float32 and returns numpy arrays; every family has one in :mod:`uqff.families` (the reference)
and one in :mod:`uqff.kernels` (the fast twin, bit-equal to it).  Types whose blocks or groups are independent of each
other are made run by run, so that of a float16 or bfloat16 weight no float32 copy exists as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import FormatError
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant, f8q8, mxfp4
from uqff.families.gguf.blocks import BlockType, block_type_of_kind

if TYPE_CHECKING:
    import torch

__all__ = ["AFQ_BITS", "HQQ_BITS", "HQQ_STEPS", "Loaded", "encode", "widened"]

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

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, scratch: F32 | None = None) -> None:
        """Nothing is done yet.

        Args:
            weight: float32, float16 or bfloat16 on the CPU.
            dtype: the load dtype.
            scratch: memory for :attr:`values`, at least as many elements as the weight has; new memory if None.
        """
        self.weight = weight.detach()
        self.dtype = dtype
        self.shape = tuple(weight.shape)
        self._scratch = scratch

    @cached_property
    def plain(self) -> torch.Tensor:
        """The weight in its load dtype, contiguous; shares memory with the given one if that is both.

        Raises:
            FormatError: a weight is not finite in that dtype; its position is named.
        """
        plain = self.weight.contiguous()
        if plain.dtype is not self.dtype:
            plain = Unquant.of(plain).dequantize(self.dtype)
        _check_finite(plain.reshape(-1), 0, self.shape)
        return plain

    @cached_property
    def values(self) -> F32:
        """The weight in its load dtype, widened to float32, C-contiguous; shares memory if the given one is that.

        Raises:
            FormatError: a weight is not finite in the load dtype; its position is named.
        """
        if self._is_float32:
            return self.plain.numpy()
        wide = self._floats(self.weight.numel())
        for at in range(0, len(wide), TILE):
            self._widen(at, wide[at : at + TILE])
        return wide.reshape(self.shape)

    def runs(self) -> Iterator[F32]:
        """:attr:`values`, flat, in runs of :data:`TILE` and a rest; each is gone when the next is asked for.

        Raises:
            FormatError: as for :attr:`values`.
        """
        if self._is_float32 or "values" in self.__dict__ or self.weight.numel() <= TILE:
            yield self.values.reshape(-1)
            return
        wide = self._floats(TILE)
        for at in range(0, self.weight.numel(), TILE):
            run = wide[: self.weight.numel() - at]
            self._widen(at, run)
            yield run

    @property
    def _is_float32(self) -> bool:
        import torch

        return self.dtype is torch.float32 and self.weight.dtype is torch.float32

    def _widen(self, start: int, out: F32) -> None:
        """Write the weights from ``start`` on."""
        import torch

        if self.dtype is self.weight.dtype:
            run = self.plain.reshape(-1)[start : start + len(out)]
        else:
            run = Unquant.of(self._flat[start : start + len(out)]).dequantize(self.dtype)
            _check_finite(run, start, self.shape)
        Unquant.of(run).dequantize(out=torch.from_numpy(out))

    @cached_property
    def _flat(self) -> torch.Tensor:
        return self.weight.contiguous().reshape(-1)

    def _floats(self, count: int) -> F32:
        # numpy asks for large pages where torch does not: filling new memory is otherwise most of the time.
        return np.empty(count, np.float32) if self._scratch is None else self._scratch[:count]


def widened(kind: str, weights: int) -> int:
    """How many of a weight's numbers are float32 at one time while :func:`encode` makes a type of them."""
    if kind == "unquant":
        return 0
    return weights if kind in HQQ_BITS or kind == "fp8" else min(weights, TILE)


def encode(loaded: Loaded, kind: str, *, engine: str, group_size: int = 64) -> QuantizedTensor:
    """The record of a weight whose shape fits the type.

    Args:
        loaded: the weight.
        kind: a type's name as :func:`uqff.isq.plan` returns it.
        engine: generation; decides the code of Q8K's largest element.
        group_size: of AFQ or HQQ.

    Raises:
        FormatError: a weight is not finite in its load dtype; its position is named.
    """
    if kind == "unquant":
        return Unquant.of(loaded.plain)
    block_type = block_type_of_kind(kind)
    if block_type is not None:
        size, at = block_type.block_size, 0
        blocks = np.empty((math.prod(loaded.shape) // size, block_type.type_size), np.uint8)
        for run in loaded.runs():
            some = blocks[at : at + len(run) // size]
            _put_blocks(run.reshape(-1, size), block_type, engine, some)
            at += len(some)
        return GGUF(_rows(blocks, loaded, size), block_type)
    if kind in AFQ_BITS:
        bits, quantize = AFQ_BITS[kind], _quantizer("afq")
        parts = _by_runs(loaded, group_size, lambda run: quantize(run.reshape(-1, group_size), bits, group_size))
        codes, scales, biases = (_rows(part, loaded, group_size) for part in parts)
        return AFQ(codes, scales.to(loaded.dtype), biases.to(loaded.dtype), bits, group_size)
    if kind in HQQ_BITS:
        w_q, scales, zeros = _quantizer("hqq")(loaded.values, HQQ_BITS[kind], group_size, HQQ_STEPS)
        tensors = (_tensor(w_q.view(np.uint8)), _tensor(scales), _tensor(zeros))
        return HQQ(*tensors, loaded.shape, HQQ_BITS[kind], group_size, optimization_steps=HQQ_STEPS)
    if kind == "fp8":
        codes, dequant, quant = _quantizer("fp8")(loaded.values)
        scale = _tensor(np.asarray(dequant))
        return FP8(_tensor(codes).view(DType.F8E4M3.torch), scale, scale, _tensor(np.asarray(quant)))
    quantize = _quantizer(kind)
    if kind == "f8q8":
        (blocks,) = _by_runs(loaded, f8q8.BLOCK_SIZE, lambda run: (quantize(run),))
        return F8Q8(_tensor(blocks), loaded.shape)
    size = mxfp4.BLOCK_SIZE
    parts = _by_runs(loaded, size, lambda run: quantize(run.reshape(-1, size)))
    return MXFP4(*(_rows(part, loaded, size) for part in parts))


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


def _rows(array: npt.NDArray[Any], loaded: Loaded, size: int) -> torch.Tensor:
    """What is ``[n, m]``, a row for every ``size`` weights, as ``[..., in / size * m]``."""
    *outer, columns = loaded.shape
    return _tensor(array).reshape(*outer, columns // size * array.shape[1])


def _check_finite(flat: torch.Tensor, start: int, shape: tuple[int, ...]) -> None:
    """Refuse a run of weights that begins at element ``start`` of a weight of that shape."""
    import torch

    bits: Any = flat.view(torch.int16 if flat.itemsize == 2 else torch.int32).numpy()
    infinity = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[flat.dtype]
    if _largest_magnitude(bits.view(np.uint16 if flat.itemsize == 2 else np.uint32)) < infinity:
        return
    first = next(
        at + int(np.argmax(bad))
        for at in range(0, len(flat), TILE)
        if (bad := ~torch.isfinite(flat[at : at + TILE]).numpy()).any()
    )
    position = tuple(int(i) for i in np.unravel_index(start + first, shape))
    raise FormatError(
        "weight is not finite", field="weight", expected="finite numbers", got=f"{float(flat[first])} at {position}"
    )


def _largest_magnitude(bits: npt.NDArray[Any]) -> int:
    """See :func:`uqff.kernels.finite.largest_magnitude`."""
    if _kernels_enabled():
        from uqff.kernels import finite

        return finite.largest_magnitude(bits)
    mask = np.iinfo(bits.dtype).max >> 1
    tiles = (bits[at : at + TILE] for at in range(0, len(bits), TILE))
    return max((int((tile & mask).max()) for tile in tiles), default=0)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def _kernels_enabled() -> bool:
    from uqff import kernels

    return kernels.enabled()


def _quantizer(family: str) -> Any:
    """The quantiser of a family other than ggml's."""
    room = "uqff.kernels.{}_quantize" if _kernels_enabled() else "uqff.families.{}"
    return import_module(room.format(family)).quantize


def _put_blocks(values: F32, block_type: BlockType, engine: str, out: npt.NDArray[np.uint8]) -> None:
    """Blocks, uint8 ``[n, type_size]``, of float32 ``[n, block_size]``."""
    if block_type.block_size == 1:
        out[:] = values.astype("<f4", copy=False).view(np.uint8)
        return
    extreme = -127 if engine == "0.9" else -128
    if _kernels_enabled():
        from uqff.kernels import gguf_quantize

        gguf_quantize.quantize(block_type.name, values, extreme=extreme, out=out)
        return
    from uqff.families.gguf.quantize import QUANTIZERS

    arguments = (extreme,) if block_type.name == "Q8K" else ()
    for at in range(0, len(values), REFERENCE_BLOCKS):
        part = values[at : at + REFERENCE_BLOCKS]
        out[at : at + REFERENCE_BLOCKS] = QUANTIZERS[block_type.name](part, *arguments)
