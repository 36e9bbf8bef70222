"""FP8: one e4m3 number per weight, one scale per tensor.

::

    offset  0            4       5          6
            version u32  type=3  bias_flag  R weight (F8E4M3)  f32 dequant_w_scale  f32 dequant_x_scale
                                            f32 quant_scale  u32 dtype=9  [R bias]

Dequantise: ``float32(weight) * dequant_w_scale``.  ``dequant_x_scale`` is a copy of the weight's scale that the CPU
path never uses; ``quant_scale`` is what the weights were multiplied by.  All three are kept as stored.

Authority: mistral.rs, ``mistralrs-quant/src/fp8/mod.rs`` (``serialize_with_bias``, ``dequantize``) and ``quantize.rs``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family, Version
from uqff.families.base import PayloadProblem, QuantizedTensor, join_parts, narrow_parts, not_finite
from uqff.families.biases import BiasRule
from uqff.families.fields import payload, tensor_fields, tensor_part
from uqff.families.stacking import check_shared, stack_parts, unstack_parts
from uqff.numerics.packing import bf16_to_float32, float32_to_bf16, float32_to_e4m3
from uqff.schema.bricks import U32, Checked, Scalar, Scope, Violation
from uqff.schema.buffers import tensor_of
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["FP8", "quantize", "quantizing_scale"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

_SCALES = ("dequant_w_scale", "dequant_x_scale", "quant_scale")


@dataclass(frozen=True, eq=False, repr=False)
class FP8(QuantizedTensor):
    """An e4m3 weight with one scale.

    Attributes:
        weight: float8_e4m3fn ``[..., out, in]``.
        dequant_w_scale: float32 ``[]``, multiplies the codes.
        dequant_x_scale: float32 ``[]``, a copy of ``dequant_w_scale`` meant for activations; unused.
        quant_scale: float32 ``[]``, what the weights were multiplied by.
    """

    weight: torch.Tensor
    dequant_w_scale: torch.Tensor
    dequant_x_scale: torch.Tensor
    quant_scale: torch.Tensor

    family: ClassVar[Family] = Family.FP8
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.FP8,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "weight" / TENSOR * "the codes, F8E4M3 `[..., out, in]`",
        "dequant_w_scale" / Scalar("f", "f32") * "multiplies the codes on dequantising",
        "dequant_x_scale" / Scalar("f", "f32") * "meant for activations; the writer repeats `dequant_w_scale`",
        "quant_scale" / Scalar("f", "f32") * "what the weights were multiplied by on quantising",
        "dtype" / Checked.choice(U32, DType.F8E4M3.code) * "dtype code of the quantised numbers, always 9 (F8E4M3)",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "weight", (DType.F8E4M3,), ("...", "in")),
        Entry("weight.dequant_w_scale", "dequant_w_scale", (DType.F32,)),
        Entry("weight.dequant_x_scale", "dequant_x_scale", (DType.F32,)),
        Entry("weight.quant_scale", "quant_scale", (DType.F32,)),
        Entry("weight.dtype", "dtype", (DType.U32,)),
        stacked_before=Version(1, 2, 0),
    )
    BIAS: ClassVar[BiasRule] = BiasRule(DType.F8E4M3)

    @property
    def kind(self) -> str:
        """Always ``fp8``."""
        return "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return tuple(self.weight.shape)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        scales = (tensor_of(blob[name], DType.F32, ()) for name in _SCALES)
        return cls(tensor_part(blob["weight"]), *scales)

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {
            "weight": tensor_fields(self.weight, name="weight"),
            **{name: payload(getattr(self, name)) for name in _SCALES},
            "dtype": DType.F8E4M3.code,
        }

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        return "fp8"

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        shape: tuple[int, ...] = blob["weight"]["shape"]
        return shape

    @staticmethod
    def validate(blob: Scope) -> None:
        """The weight is F8E4M3 and has at least one dimension."""
        weight = blob["weight"]
        if weight["dtype"] is not DType.F8E4M3:
            raise Violation("wrong dtype", field="weight.dtype", expected="9 F8E4M3", got=weight["dtype"].name)
        if not weight["shape"]:
            raise Violation("weight without dimensions", field="weight.ndim", expected="at least 1", got=0)

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Codes are not NaN, scales are finite."""
        yield from not_finite(blob["weight"], "weight.data")
        for name in _SCALES:
            value = np.frombuffer(blob[name], "<f4")[0]
            if not np.isfinite(value):
                yield PayloadProblem(name, 0, "scale is not finite", "a finite number", str(value))

    def _dequantize(self) -> torch.Tensor:
        import torch

        return self.weight.to(torch.float32) * self.dequant_w_scale

    def alignment(self, dim: int) -> int:
        """1 along every dimension: all weights share one scale."""
        self._dim(dim)
        return 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, 1, weight=1)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "weight")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        check_shared(records, *_SCALES)
        return stack_parts(records, "weight")

    def _unstack(self) -> Self:
        return unstack_parts(self, "weight")


E4M3_MAX = np.float32(416)
"""``F8E4M3::MAX`` of the float8 crate, code 0x7D; the largest finite e4m3 value, 448, is its ``INFINITY``."""


def quantize(w: FloatArray) -> tuple[ByteArray, np.float32, np.float32]:
    """Quantise a whole tensor with one scale.

    Args:
        w: finite float32, any shape, at least one element.

    Returns:
        e4m3 codes, uint8 of the shape of ``w``; the dequantising scale ``1 / s``; the quantising scale s. s is 416 for
        every tensor whose magnitudes are all at most 1. A weight that rounds to infinity in bfloat16 makes s 0, and its
        own code NaN (0xFF).
    """
    with np.errstate(all="ignore"):
        x = _bf16(w)
        scale = quantizing_scale(np.abs(x).max())
        product = _bf16(x * scale)
        codes = np.where(np.isnan(product), np.uint8(0xFF), float32_to_e4m3(product))
        return codes, np.float32(1) / scale, scale


def quantizing_scale(absmax: FloatArray | np.float32) -> np.float32:
    """``416 / absmax`` as the engine takes it: reciprocal, then product, each rounded to bfloat16; at most 416."""
    with np.errstate(all="ignore"):
        inverse = _bf16(np.float32(1) / np.asarray(absmax, np.float32))
        scale: np.float32 = np.minimum(_bf16(inverse * E4M3_MAX), E4M3_MAX)[()]
        return scale


def _bf16(x: FloatArray) -> FloatArray:
    return bf16_to_float32(float32_to_bf16(x))
