"""F8Q8: 8-bit integers in blocks of 32, the scale of a block in one byte (e4m3, divided by 416).

::

    offset  0            4       5          6               10        14
            version u32  type=5  bias_flag  num_blocks u32  ndim u32  shape u32 × ndim  33-byte blocks  [R bias]

    block:  | d: e4m3, 1 byte | qs: 32 × i8 |                                                1 + 32 = 33 bytes

Blocks cut the *flattened* weight; only the very end is padded (with zero codes), so a block runs across rows where the
input dimension is not a multiple of 32.  Dequantise: ``qs * (float32(d) / 416)``.

Authority: mistral.rs, ``mistralrs-quant/src/f8q8/mod.rs`` (``BlockF8Q8``, ``serialize_with_bias``, ``dequantize``).
416 is what the float8 crate calls the largest e4m3 number: ``F8E4M3::MAX`` is code 0x7D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family, Version
from uqff.errors import ShardError
from uqff.families.base import PayloadProblem, QuantizedTensor, first_bad, runs
from uqff.families.biases import BiasRule
from uqff.families.fields import payload
from uqff.families.parts import own
from uqff.numerics.packing import float32_to_e4m3, round_half_away
from uqff.schema.bricks import U32, Derived, Dims, Scalar, Scope, Span, Vector, Violation
from uqff.schema.buffers import flat_bytes
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["F8Q8", "quantize"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

BLOCK_SIZE = 32
D_SCALE = 416.0
"""``F8E4M3::MAX`` of the float8 crate, code 0x7D; the largest finite e4m3 number, 448, is its ``INFINITY``."""

BLOCK = Layout(
    "d" / Scalar("B", "e4m3") * "scale of the block times 416, as an e4m3 code",
    "qs" / Vector(BLOCK_SIZE, "b", "i8") * "the codes, in element order",
)


def _blocks_bytes(blob: Any) -> int:
    return BLOCK.fixed_size * int(blob["num_blocks"])


@dataclass(frozen=True, eq=False, repr=False)
class F8Q8(QuantizedTensor):
    """A weight of 8-bit blocks with 8-bit scales.

    Attributes:
        blocks: uint8 ``[num_blocks, 33]``.
        weight_shape: logical dimensions.
    """

    blocks: torch.Tensor
    weight_shape: tuple[int, ...]

    family: ClassVar[Family] = Family.F8Q8
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.F8Q8,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "num_blocks"
        / Derived(U32, lambda b: b["data"].nbytes // BLOCK.fixed_size)
        * "number of blocks, ⌈∏`shape` / 32⌉",
        "ndim" / Derived(U32, lambda b: len(b["shape"])) * "number of dimensions",
        "shape" / Dims("ndim") * "logical dimensions in elements, outermost first",
        "data" / Span(_blocks_bytes, f"{BLOCK.fixed_size}·num_blocks") * "the blocks",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "data", (DType.U8,), ("33·num_blocks",)),
        Entry("weight.num_blocks", "num_blocks", (DType.U32,)),
        Entry("weight.shape", "shape", (DType.U32,), ("ndim",)),
        stacked_before=Version(1, 2, 0),
    )
    BIAS: ClassVar[BiasRule] = BiasRule(DType.F32, {0: DType.F32})

    @property
    def kind(self) -> str:
        """Always ``f8q8``."""
        return "f8q8"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return self.weight_shape

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls(flat_bytes(blob["data"]).view(-1, BLOCK.fixed_size), blob["shape"])

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {"shape": self.weight_shape, "data": payload(self.blocks)}

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        return "f8q8"

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        shape: tuple[int, ...] = blob["shape"]
        return shape

    @staticmethod
    def validate(blob: Scope) -> None:
        """There are exactly as many blocks as the shape needs."""
        if not blob["shape"]:
            raise Violation("weight without dimensions", field="ndim", expected="at least 1", got=0)
        expected = -(-math.prod(blob["shape"]) // BLOCK_SIZE)
        got = blob["data"].nbytes // BLOCK.fixed_size
        if got != expected:
            raise Violation("block count does not fit shape", field="num_blocks", expected=expected, got=got)

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """No scale is NaN, and the padding after the last element is zero."""
        blocks = np.frombuffer(blob["data"], np.uint8).reshape(-1, BLOCK.fixed_size)
        yield from first_bad((blocks[:, 0] & 0x7F) == 0x7F, "data", BLOCK.fixed_size, "a scale that is a number")
        padding = blocks[:, 1:].reshape(-1)[math.prod(blob["shape"]) :]
        if padding.any():
            at = blob["data"].nbytes - len(padding) + int(np.argmax(padding != 0))
            yield PayloadProblem("data", at, "padding after the last element", "0", str(padding[padding != 0][0]))

    def _dequantize(self) -> torch.Tensor:
        import torch

        stored = self.blocks[:, :1].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
        # Divided by a tensor: by a number, torch on CUDA multiplies with its rounded inverse.
        d = stored / torch.full_like(stored, D_SCALE)
        qs = self.blocks[:, 1:].contiguous().view(torch.int8).to(torch.float32)
        return (qs * d).reshape(-1)[: self.numel].reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """The rows (or inputs) after which blocks begin anew; where they never do within a run, the whole dimension."""
        axis = self._dim(dim)
        count, length, step = runs(self.shape, axis)
        if count > 1 and length % BLOCK_SIZE:
            return self.shape[axis]
        return BLOCK_SIZE // math.gcd(BLOCK_SIZE, step)

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        count, _, step = runs(self.shape, dim)
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        blocks = self.blocks.view(count, -1, BLOCK.fixed_size)
        # Only the end of the last run can lie within a block, whose padding is then part of the slice.
        begin, end = start * step // BLOCK_SIZE, -(-(start + length) * step // BLOCK_SIZE)
        return type(self)(own(blocks[:, begin:end].contiguous()).view(-1, BLOCK.fixed_size), shape)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        import torch

        count, _, _ = runs(self.shape, dim)
        blocks = torch.cat([each.blocks.view(count, -1, BLOCK.fixed_size) for _, each in slices], dim=1)
        return type(self)(blocks.view(-1, BLOCK.fixed_size), self.shape)

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        import torch

        first = records[0]
        if len(records) > 1 and first.numel % BLOCK_SIZE:
            raise ShardError(
                "weights do not stack: f8q8 blocks would run across experts",
                expected=f"elements in multiples of {BLOCK_SIZE}",
                got=f"{list(first.shape)}, {first.numel} elements",
            )
        return cls(torch.cat([record.blocks for record in records]), (len(records), *first.shape))

    def _unstack(self) -> Self:
        return type(self)(self.blocks, self.shape[1:])


def quantize(w: FloatArray) -> ByteArray:
    """Quantise the flattened weight; blocks run across rows, the last one is padded with zeros.

    Args:
        w: finite float32, any shape, flattened in C order.

    Returns:
        uint8 ``[ceil(n / 32), 33]``: the scale ``e4m3(d * 416)``, then 32 int8 codes ``round(w / d)``, made with the d
        before its rounding. d is a 127th of the largest magnitude.
    """
    flat = w.reshape(-1)
    blocks = np.concatenate([flat, np.zeros(-len(flat) % BLOCK_SIZE, np.float32)]).reshape(-1, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        d = np.abs(blocks).max(-1, keepdims=True, initial=0) / np.float32(127)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        # A subnormal d has an infinite inverse: Rust's casts saturate infinity and turn 0 * inf, a NaN, into 0.
        codes = np.clip(round_half_away(blocks * inverse), np.float32(-128), np.float32(127))
        scale = float32_to_e4m3(d * np.float32(D_SCALE))
    return np.concatenate([scale, np.nan_to_num(codes, nan=0.0).astype(np.int8).view(np.uint8)], axis=-1)
