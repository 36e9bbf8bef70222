"""From a plain weight to a family's record: rounding, the check for numbers that are not finite, kernel or reference.

A quantiser takes finite float32 and returns numpy arrays; every family has one in :mod:`uqff.families` (the reference)
and one in :mod:`uqff.kernels` (the fast twin, bit-equal to it).
"""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import FormatError
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant
from uqff.families.gguf.blocks import BlockType, block_type_of_kind

if TYPE_CHECKING:
    import torch

__all__ = ["AFQ_BITS", "HQQ_BITS", "HQQ_STEPS", "Loaded", "encode"]

F32: TypeAlias = npt.NDArray[np.float32]

AFQ_BITS: Final = {"afq2": 2, "afq3": 3, "afq4": 4, "afq6": 6, "afq8": 8}
HQQ_BITS: Final = {"hqq1": 1, "hqq2": 2, "hqq3": 3, "hqq4": 4, "hqq8": 8}

HQQ_STEPS: Final = 10
"""Turns of HQQ's optimiser, as the engine has them."""

TILE: Final = 1 << 22
"""Weights that are rounded, widened and checked together if that takes more than one step."""

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
        import torch

        if self.dtype is torch.float32 and self.weight.dtype is torch.float32:
            return self.plain.numpy()
        wide = self._wide()
        if self.dtype is self.weight.dtype:
            Unquant.of(self.plain).dequantize(out=wide)
            return wide.numpy()
        flat = self.weight.contiguous().reshape(-1)
        for at in range(0, len(flat), TILE):
            tile = Unquant.of(flat[at : at + TILE]).dequantize(self.dtype)
            _check_finite(tile, at, self.shape)
            Unquant.of(tile).dequantize(out=wide.reshape(-1)[at : at + TILE])
        return wide.numpy()

    def _wide(self) -> torch.Tensor:
        import torch

        count = self.weight.numel()
        # numpy asks for large pages where torch does not: filling new memory is otherwise most of the time.
        scratch = np.empty(count, np.float32) if self._scratch is None else self._scratch[:count]
        return torch.from_numpy(scratch).view(self.shape)


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
    values, shape = loaded.values, loaded.shape
    block_type = block_type_of_kind(kind)
    if block_type is not None:
        blocks = _blocks(values.reshape(-1, block_type.block_size), block_type, engine)
        row = shape[-1] // block_type.block_size * block_type.type_size
        return GGUF(_tensor(blocks).reshape(*shape[:-1], row), block_type)
    if kind in AFQ_BITS:
        codes, *affine = _quantizer("afq")(values, AFQ_BITS[kind], group_size)
        scales, biases = (_tensor(part).to(loaded.dtype) for part in affine)
        return AFQ(_tensor(codes), scales, biases, AFQ_BITS[kind], group_size)
    if kind in HQQ_BITS:
        w_q, scales, zeros = _quantizer("hqq")(values, HQQ_BITS[kind], group_size, HQQ_STEPS)
        parts = (_tensor(w_q.view(np.uint8)), _tensor(scales), _tensor(zeros))
        return HQQ(*parts, shape, HQQ_BITS[kind], group_size, optimization_steps=HQQ_STEPS)
    if kind == "fp8":
        codes, dequant, quant = _quantizer("fp8")(values)
        scale = _tensor(np.asarray(dequant))
        return FP8(_tensor(codes).view(DType.F8E4M3.torch), scale, scale, _tensor(np.asarray(quant)))
    if kind == "f8q8":
        return F8Q8(_tensor(_quantizer("f8q8")(values)), shape)
    return MXFP4(*map(_tensor, _quantizer("mxfp4")(values)))


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


def _blocks(values: F32, block_type: BlockType, engine: str) -> npt.NDArray[np.uint8]:
    """Blocks uint8 ``[n, type_size]`` of float32 ``[n, block_size]``."""
    if block_type.block_size == 1:
        return values.astype("<f4").view(np.uint8).reshape(-1, 4)
    extreme = -127 if engine == "0.9" else -128
    if _kernels_enabled():
        from uqff.kernels import gguf_quantize

        return gguf_quantize.quantize(block_type.name, values, extreme=extreme)
    from uqff.families.gguf.quantize import QUANTIZERS

    arguments = (extreme,) if block_type.name == "Q8K" else ()
    out = np.empty((len(values), block_type.type_size), np.uint8)
    for at in range(0, len(values), REFERENCE_BLOCKS):
        part = values[at : at + REFERENCE_BLOCKS]
        out[at : at + REFERENCE_BLOCKS] = QUANTIZERS[block_type.name](part, *arguments)
    return out
