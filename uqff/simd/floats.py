"""Plain float weights by their bits: numpy has no bfloat16, and torch is not needed to move and round them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType
from uqff.numerics import packing
from uqff.schema.buffers import as_array, writable_alias

if TYPE_CHECKING:
    import torch

__all__ = ["Floats", "largest_magnitude"]

TILE: Final = 1 << 21
"""Numbers that are looked at together where that takes memory."""

_INFINITY: Final = {DType.F32: 0x7F800000, DType.F16: 0x7C00, DType.BF16: 0x7F80}
_WORD: Final[dict[int, npt.DTypeLike]] = {2: np.uint16, 4: np.uint32}
_NARROWED: Final = {DType.F16: packing.float32_to_f16, DType.BF16: packing.float32_to_bf16}
_WIDENED: Final = {DType.F16: packing.f16_to_float32, DType.BF16: packing.bf16_to_float32}


@dataclass(frozen=True, eq=False)
class Floats:
    """An array of float32, float16 or bfloat16.

    Attributes:
        bits: uint32 or uint16, of any strides.
        dtype: whose bits they are.
    """

    bits: npt.NDArray[Any]
    dtype: DType

    @classmethod
    def of_bytes(cls, data: Any, dtype: DType, shape: tuple[int, ...]) -> Floats:
        """A view of bytes, little-endian and row major; a copy if they are not aligned."""
        word = _WORD[dtype.itemsize]
        bits = np.frombuffer(writable_alias(data), word) if math.prod(shape) else np.empty(0, word)
        return cls((bits if bits.flags.aligned else bits.copy()).reshape(shape), dtype)

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> Floats:
        """A view of a tensor on the CPU."""
        import torch

        dtype = DType.of_torch(tensor.dtype)
        assert dtype in _INFINITY
        signed: Any = tensor.detach().view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
        return cls(signed.view(_WORD[dtype.itemsize]), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.bits.shape

    @property
    def flat(self) -> Floats:
        """All in a row; a view if they are that in memory."""
        return Floats(np.ascontiguousarray(self.bits).reshape(-1), self.dtype)

    def __getitem__(self, index: Any) -> Floats:
        """As numpy's, of the same dtype."""
        return Floats(self.bits[index], self.dtype)

    @property
    def T(self) -> Floats:
        """The transposed matrix, a view."""
        return Floats(self.bits.T, self.dtype)

    @property
    def is_finite(self) -> bool:
        """Whether there is no infinity and no NaN; C-contiguous numbers only."""
        return largest_magnitude(self.bits.reshape(-1)) < _INFINITY[self.dtype]

    def first_not_finite(self) -> int:
        """Index of the first infinity or NaN in :attr:`flat`, where there is one."""
        mask, bits = _INFINITY[self.dtype], self.flat.bits
        tiles = ((at, (bits[at : at + TILE] & mask) == mask) for at in range(0, len(bits), TILE))
        return next(at + int(np.argmax(bad)) for at, bad in tiles if bad.any())

    def cast(self, dtype: DType, *, payloads: bool = True) -> Floats:
        """Rounded to the nearest, ties to even; C-contiguous, and itself if it is that in the dtype already.

        Args:
            dtype: of the result.
            payloads: whether a NaN keeps its sign and, as far as there is room, its payload (it becomes quiet); to know
                whether there is one, all numbers are looked at first. If not, it becomes any NaN.
        """
        source = Floats(np.ascontiguousarray(self.bits), self.dtype)
        if dtype is self.dtype:
            return source
        made = Floats(np.empty(self.shape, _WORD[dtype.itemsize]), dtype)
        source.cast_into(made, payloads=payloads)
        return made

    def cast_into(self, out: Floats, *, payloads: bool = True) -> None:
        """:meth:`cast` into other memory; both C-contiguous."""
        source, target = self.bits.reshape(-1), out.bits.reshape(-1)
        if out.dtype is self.dtype:
            target[:] = source
            return
        # Kernels drop what a NaN carries.
        if (not payloads or self.is_finite) and simd.enabled():
            from uqff.simd import cast, output

            if cast.cast(as_array(source), self.dtype, target.view(np.uint8), output.FORMS[out.dtype]):
                return
        for at in range(0, len(source), TILE):
            tile = source[at : at + TILE]
            wide = tile.view(np.float32) if self.dtype is DType.F32 else _WIDENED[self.dtype](tile)
            narrow = wide.view(np.uint32) if out.dtype is DType.F32 else _NARROWED[out.dtype](wide)
            target[at : at + TILE] = narrow

    @property
    def data(self) -> memoryview:
        """The bytes, row major and little-endian."""
        return np.ascontiguousarray(self.bits).reshape(-1).view(np.uint8).data


def largest_magnitude(bits: npt.NDArray[Any]) -> int:
    """See :func:`uqff.simd.finite.largest_magnitude`."""
    if simd.enabled():
        from uqff.simd import finite

        return finite.largest_magnitude(bits)
    mask = np.iinfo(bits.dtype).max >> 1
    tiles = (bits[at : at + TILE] for at in range(0, len(bits), TILE))
    return max((int((tile & mask).max()) for tile in tiles), default=0)
