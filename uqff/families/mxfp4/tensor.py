"""MXFP4: 4-bit floats (e2m1) in blocks of 32 along the input dimension, one power-of-two scale (e8m0) per block.

::

    offset  0            4       5          6
            version u32  type=6  bias_flag  R blocks (U8 [..., in/2])  R scales (U8 [..., in/32])  [R bias]

    byte j of a row of blocks:   h h h h l l l l      l: element 2j,  h: element 2j + 1
    nibble:                      s e e m              sign, exponent, mantissa: the values of _E2M1

Dequantise: ``_E2M1[nibble] * float32 with exponent field = scale``.  Scale code 0 therefore means 0.0 (not 2**-127) and
255 means infinity, as in the engine.

Authority: mistral.rs, ``mistralrs-quant/src/mxfp4/mod.rs`` (``serialize_with_bias``, ``dequantize_weights``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family
from uqff.families.base import PayloadProblem, QuantizedTensor, first_bad, join_parts, narrow_parts
from uqff.families.biases import BiasRule
from uqff.families.fields import tensor_fields, tensor_part
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.schema.bricks import Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["MXFP4", "floor_log2", "quantize", "scale_bytes"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

BLOCK_SIZE = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each nibble: sign, two exponent bits (bias 1), one mantissa bit (OCP Microscaling Formats v1.0, 5.3.3)."""


@dataclass(frozen=True, eq=False, repr=False)
class MXFP4(QuantizedTensor):
    """A weight of 4-bit floats.

    Attributes:
        blocks: uint8 ``[..., out, in/2]``, two nibbles a byte, the lower one first.
        scales: uint8 ``[..., out, in/32]``, exponents with bias 127.
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    family: ClassVar[Family] = Family.MXFP4
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.MXFP4,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "blocks" / TENSOR * "the nibbles, U8 `[..., out, in/2]`, the lower nibble first",
        "scales" / TENSOR * "the block exponents, U8 `[..., out, in/32]`, bias 127",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "blocks", (DType.U8,), ("...", "in/2")),
        Entry("weight.scales", "scales", (DType.U8,), ("...", "in/32")),
    )
    BIAS: ClassVar[BiasRule] = BiasRule(DType.BF16)

    @property
    def kind(self) -> str:
        """Always ``mxfp4``."""
        return "mxfp4"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return (*self.blocks.shape[:-1], 2 * self.blocks.shape[-1])

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls(tensor_part(blob["blocks"]), tensor_part(blob["scales"]))

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {
            "blocks": tensor_fields(self.blocks, name="blocks"),
            "scales": tensor_fields(self.scales, name="scales"),
        }

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        return "mxfp4"

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        *outer, row = blob["blocks"]["shape"]
        return (*outer, 2 * row)

    @staticmethod
    def validate(blob: Scope) -> None:
        """Both parts are U8, and each row has one scale for every 16 bytes of nibbles."""
        blocks, scales = blob["blocks"], blob["scales"]
        for name, part in (("blocks", blocks), ("scales", scales)):
            if part["dtype"] is not DType.U8:
                raise Violation("wrong dtype", field=f"{name}.dtype", expected="0 U8", got=part["dtype"].name)
        if not blocks["shape"]:
            raise Violation("weight without dimensions", field="blocks.ndim", expected="at least 1", got=0)
        *outer, row = blocks["shape"]
        if row % (BLOCK_SIZE // 2):
            raise Violation(
                "row is not whole blocks", field="blocks.shape", expected=f"a multiple of {BLOCK_SIZE // 2}", got=row
            )
        expected = (*outer, row // (BLOCK_SIZE // 2))
        if scales["shape"] != expected:
            raise Violation(
                "shape does not fit blocks", field="scales.shape", expected=list(expected), got=list(scales["shape"])
            )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """No scale is 255: it would be infinite."""
        scales = np.frombuffer(blob["scales"]["data"], np.uint8)
        yield from first_bad(scales == 255, "scales.data", 1, "an exponent from 0 to 254")

    def _dequantize(self) -> torch.Tensor:
        import torch

        nibbles = torch.stack((self.blocks & 0x0F, self.blocks >> 4), dim=-1)
        values = torch.tensor(_E2M1, dtype=torch.float32, device=self.device)[nibbles.long()]
        scales = (self.scales.to(torch.int32) << 23).view(torch.float32)
        blocks = values.reshape(*self.scales.shape, BLOCK_SIZE) * scales.unsqueeze(-1)
        return blocks.reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """A block along the last dimension, 1 along others."""
        return BLOCK_SIZE if self._dim(dim) == len(self.shape) - 1 else 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, BLOCK_SIZE, blocks=BLOCK_SIZE // 2, scales=1)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "blocks", "scales")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "blocks", "scales")

    def _unstack(self) -> Self:
        return unstack_parts(self, "blocks", "scales")


THRESHOLDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
"""Code k is taken from ``THRESHOLDS[k - 1]`` on: the midpoints of 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go up."""

BIAS = 127
"""A scale byte s means 2^(s - 127)."""


def quantize(w: FloatArray) -> tuple[ByteArray, ByteArray]:
    """Quantise along the last dimension.

    Args:
        w: finite float32 ``[..., in]``, ``in`` a multiple of 32.

    Returns:
        Codes uint8 ``[..., in / 2]``, the even element in the low nibble; scale bytes uint8 ``[..., in / 32]``. Bit 3
        of a code is the sign of elements below zero: -0.1 may become code 8, -0.0 becomes 0.
    """
    blocks = w.reshape(*w.shape[:-1], w.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        scales = scale_bytes(np.abs(blocks).max(-1))
        scaled = blocks * np.ldexp(np.float32(1), BIAS - scales.astype(np.int32))[..., None]
        codes = np.searchsorted(THRESHOLDS, np.abs(scaled), side="right").astype(np.uint8)
        codes |= (scaled < 0).astype(np.uint8) << 3
    codes = codes.reshape(w.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def scale_bytes(absmax: FloatArray) -> ByteArray:
    """``floor(log2f(absmax / 6)) + 127`` within 0..254, and 127 for a block of zeros."""
    exponent = np.maximum(floor_log2(absmax / np.float32(6)), np.float32(-BIAS)).astype(np.int32)
    return np.where(absmax == 0, BIAS, np.clip(exponent + BIAS, 0, 254)).astype(np.uint8)


def floor_log2(x: FloatArray) -> FloatArray:
    """``floor(log2f(x))``, -inf for 0.

    log2f rounds to float32 before the floor. Just below 2^k it rounds up to k, from 1 ulp for k = 3 up to 44 ulps for
    k beyond 64; the result is then one more than the exponent of x. Rounding from float64 takes the same side as
    glibc's log2f for every float32.
    """
    with np.errstate(divide="ignore"):
        return np.floor(np.log2(x.astype(np.float64)).astype(np.float32))
