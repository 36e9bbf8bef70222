"""AFQ: MLX's affine quantisation; codes in groups along the input dimension, a scale and a bias per group.

::

    offset  0            4       5          6
            version u32  type=4  bias_flag  R w_q (U32 [..., in·bits/32])  R scales [..., in/group]
                                            R biases [..., in/group]  u8 bits  u8 group_size  [R bias]

    row of w_q as a little-endian bit stream: code j occupies bits j·b to j·b + b - 1; 3 and 6 bit codes cross bytes
    b = 4:  byte 0 = 1 1 1 1 0 0 0 0      b = 3:  byte 0 = 2 2 1 1 1 0 0 0   byte 1 = 5 4 4 4 3 3 3 2

Dequantise: ``q * scale + bias``.  ``biases`` belong to the groups; the layer's own ``bias`` is another thing.

Authority: mistral.rs, ``mistralrs-quant/src/afq/mod.rs`` (``serialize_with_bias``), ``afq/ops.rs``
(``afq_dequantize_op``); packing: MLX, ``mlx/backend/cpu/quantized.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family
from uqff.families.base import PayloadProblem, QuantizedTensor, join_parts, narrow_parts, not_finite
from uqff.families.biases import BiasRule
from uqff.families.fields import bytes_part, stored_part, tensor_fields
from uqff.families.parts import lazily_typed
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.numerics.packing import float32_to_bf16, float32_to_f16, pack_row, round_half_away
from uqff.schema.bricks import U8, Checked, Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["AFQ", "cast", "quantize"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
ScalesDType: TypeAlias = Literal["float32", "float16", "bfloat16"]

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (DType.F32, DType.F16, DType.BF16)


@lazily_typed("scales", "biases")
@dataclass(frozen=True, eq=False, repr=False)
class AFQ(QuantizedTensor):
    """A weight of affine groups.

    Attributes:
        w_q: uint8 ``[..., out, in·bits/8]``, the bytes of the stored U32 words: each row is one bit stream.
        scales: float32, float16 or bfloat16 ``[..., out, in/group_size]``.
        biases: same dtype and shape as ``scales``.
        bits: 2, 3, 4, 6 or 8.
        group_size: 32, 64 or 128 inputs.
    """

    w_q: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor
    bits: int
    group_size: int

    family: ClassVar[Family] = Family.AFQ
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.AFQ,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "w_q" / TENSOR * "the packed codes, U32 `[..., out, in·bits/32]`",
        "scales" / TENSOR * "scale of each group, F32, F16 or BF16 `[..., out, in/group_size]`",
        "biases" / TENSOR * "value of code 0 of each group, like `scales`",
        "bits" / Checked.choice(U8, *BITS) * "bits per code: 2, 3, 4, 6 or 8",
        "group_size" / Checked.choice(U8, *GROUP_SIZES) * "inputs per group: 32, 64 or 128",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight.bits", "bits", (DType.U8,)),
        Entry("weight.group_size", "group_size", (DType.U8,)),
        Entry("weight", "w_q", (DType.U32,), ("...", "in·bits/32")),
        Entry("weight.scales", "scales", SCALE_DTYPES, ("...", "in/group_size")),
        Entry("weight.biases", "biases", SCALE_DTYPES, ("...", "in/group_size")),
    )
    BIAS: ClassVar[BiasRule] = BiasRule()

    @property
    def kind(self) -> str:
        """``afq2``, ``afq3``, ``afq4``, ``afq6`` or ``afq8``."""
        return f"afq{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return (*self.w_q.shape[:-1], self.w_q.shape[-1] * 8 // self.bits)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls(
            bytes_part(blob["w_q"]),
            stored_part(blob["scales"]),  # type: ignore[arg-type]
            stored_part(blob["biases"]),  # type: ignore[arg-type]
            blob["bits"],
            blob["group_size"],
        )

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        *outer, row = self.w_q.shape
        return {
            "w_q": tensor_fields(self.w_q, name="w_q", dtype=DType.U32, shape=(*outer, row // DType.U32.itemsize)),
            "scales": tensor_fields(self._parts()["scales"], name="scales"),
            "biases": tensor_fields(self._parts()["biases"], name="biases"),
            "bits": self.bits,
            "group_size": self.group_size,
        }

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        return f"afq{blob['bits']}"

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        *outer, words = blob["w_q"]["shape"]
        return (*outer, 32 * words // blob["bits"])

    @staticmethod
    def validate(blob: Scope) -> None:
        """Rows hold whole groups; scales and biases have one float per group."""
        w_q, scales, biases = blob["w_q"], blob["scales"], blob["biases"]
        if w_q["dtype"] is not DType.U32:
            raise Violation("wrong dtype", field="w_q.dtype", expected="1 U32", got=w_q["dtype"].name)
        if scales["dtype"] not in SCALE_DTYPES:
            allowed = ", ".join(d.name for d in SCALE_DTYPES)
            raise Violation("wrong dtype", field="scales.dtype", expected=allowed, got=scales["dtype"].name)
        if biases["dtype"] is not scales["dtype"]:
            raise Violation(
                "wrong dtype", field="biases.dtype", expected=scales["dtype"].name, got=biases["dtype"].name
            )
        if not w_q["shape"]:
            raise Violation("weight without dimensions", field="w_q.ndim", expected="at least 1", got=0)
        *outer, words = w_q["shape"]
        group_bits = blob["group_size"] * blob["bits"]
        if 32 * words % group_bits:
            raise Violation(
                "row is not whole groups", field="w_q.shape", expected=f"a multiple of {group_bits // 32}", got=words
            )
        expected = (*outer, 32 * words // group_bits)
        for name, part in (("scales", scales), ("biases", biases)):
            if part["shape"] != expected:
                raise Violation(
                    "shape does not fit w_q", field=f"{name}.shape", expected=list(expected), got=list(part["shape"])
                )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Scales and biases are finite."""
        yield from not_finite(blob["scales"], "scales.data")
        yield from not_finite(blob["biases"], "biases.data")

    def _dequantize(self) -> torch.Tensor:
        import torch

        codes = unpack_stream(self.w_q, self.bits).to(torch.float32)
        groups = codes.reshape(*self.scales.shape, self.group_size)
        scale, bias = (part.to(torch.float32).unsqueeze(-1) for part in (self.scales, self.biases))
        return (groups * scale + bias).reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """A group along the last dimension, 1 along others."""
        return self.group_size if self._dim(dim) == len(self.shape) - 1 else 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(
            self, dim, start, length, self.group_size, w_q=self.group_size * self.bits // 8, scales=1, biases=1
        )

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "w_q", "scales", "biases")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "w_q", "scales", "biases")

    def _unstack(self) -> Self:
        return unstack_parts(self, "w_q", "scales", "biases")


def unpack_stream(w_q: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of little-endian bit streams, uint8 ``[..., n·bits/8]`` to uint8 ``[..., n]``."""
    import torch

    # A period of lcm(bits, 8) bits is whole codes and whole bytes: b bytes hold 8 codes for odd b, and so on.
    period = {2: 1, 3: 3, 4: 1, 6: 3, 8: 1}[bits]
    chunks = w_q.reshape(*w_q.shape[:-1], -1, period).to(torch.int32)
    word = torch.zeros_like(chunks[..., 0])
    for i in range(period):
        word |= chunks[..., i] << 8 * i
    codes = [word >> bits * j & (1 << bits) - 1 for j in range(8 * period // bits)]
    return torch.stack(codes, dim=-1).to(torch.uint8).reshape(*w_q.shape[:-1], -1)


FLAT = np.float32(1e-12)
"""A group whose range is below this gets scale 1; all its codes are then 0."""


def quantize(w: FloatArray, bits: int, group_size: int) -> tuple[ByteArray, FloatArray, FloatArray]:
    """Quantise along the last dimension.

    Args:
        w: finite float32 ``[..., in]``, ``in`` a multiple of ``group_size``.
        bits: 2, 3, 4, 6 or 8.
        group_size: 32, 64 or 128.

    Returns:
        The packed codes as bytes, uint8 ``[..., in * bits / 8]``; scales and biases, float32
        ``[..., in / group_size]``, to be cast by :func:`cast`. The codes are made with the scale before the cast. A
        zero bias is +0.0 (the engine's depends on its compiler's choice for the minimum of -0.0 and +0.0).
    """
    top = np.float32(2**bits - 1)
    groups = w.reshape(*w.shape[:-1], w.shape[-1] // group_size, group_size)
    with np.errstate(all="ignore"):
        bias = groups.min(-1, keepdims=True) + np.float32(0)
        span = groups.max(-1, keepdims=True) - bias
        scale = np.where(np.abs(span) < FLAT, np.float32(1), span / top)
        codes = np.clip(round_half_away((groups - bias) / scale), np.float32(0), top)
    # inf / inf: a range beyond float32 has an infinite scale. Rust casts NaN to 0.
    packed = pack_row(np.nan_to_num(codes, nan=0.0).astype(np.uint8).reshape(w.shape), bits)
    return packed, scale[..., 0], bias[..., 0]


def cast(values: FloatArray, dtype: ScalesDType) -> npt.NDArray[Any]:
    """Scales or biases as they are stored, rounded to nearest even: float32 values, or uint16 bit patterns."""
    if dtype == "float16":
        return float32_to_f16(values)
    if dtype == "bfloat16":
        return float32_to_bf16(values)
    return values
