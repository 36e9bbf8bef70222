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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType, Family, Version
from uqff.families.base import QuantizedTensor
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine
from uqff.families.fp8 import reference
from uqff.families.loaded import Loaded
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem, not_finite
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import check_shared, stack_parts, unstack_parts
from uqff.numerics.packing import e4m3_to_float32
from uqff.schema.bricks import U32, Checked, Scalar, Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.decoding import Decoding

__all__ = ["FP8"]

_SCALES = ("dequant_w_scale", "dequant_x_scale", "quant_scale")

_ASCENDING = np.array([*range(0xFE, 0x80, -1), *range(0x7F)], np.uint8)
"""The e4m3 codes of all numbers from the least to the largest; of the zeros, the positive one."""


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

    family: ClassVar[Family] = Family(3, "FP8", Version(0, 1, 2))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "weight" / TENSOR * "the codes, F8E4M3 `[..., out, in]`",
        "dequant_w_scale" / Scalar("f", "f32") * "multiplies the codes on dequantising",
        "dequant_x_scale" / Scalar("f", "f32") * "meant for activations; the writer repeats `dequant_w_scale`",
        "quant_scale" / Scalar("f", "f32") * "what the weights were multiplied by on quantising",
        "dtype"
        / Checked.choice(U32, DType.F8E4M3.code, rule="FP8-02")
        * "dtype code of the quantised numbers, always 9 (F8E4M3)",
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

    KINDS: ClassVar[tuple[str, ...]] = ("fp8",)

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        scales = dict.fromkeys(_SCALES, Part.planned((), DType.F32))
        return cls.made_of(weight=Part.planned(shape, DType.F8E4M3), **scales)

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`."""
        made = _quantizer()(loaded.values)
        if effort.name == "best":
            rows = loaded.values.reshape(-1, loaded.shape[-1])
            importance = np.ones((1, rows.shape[1]), np.float32) if effort.importance is None else effort.importance
            codes, *numbers = _search()(rows, importance, made)
            codes = codes.reshape(loaded.shape)
        else:
            codes, *numbers = made
        scale, quant_scale = (Part.of_array(np.asarray(number, "<f4"), DType.F32) for number in numbers)
        weight = Part.of_array(codes, DType.F8E4M3)
        return cls.made_of(weight=weight, dequant_w_scale=scale, dequant_x_scale=scale, quant_scale=quant_scale)

    @classmethod
    def widened(cls, weights: int) -> int:
        """All: the scale is of the whole weight."""
        return weights

    @property
    def scale_inputs(self) -> int:
        """0: all weights share one scale."""
        return 0

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """See :attr:`QuantizedTensor.code_values`."""
        return e4m3_to_float32(_ASCENDING).astype(np.float64)

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """See :meth:`QuantizedTensor.with_codes`."""
        return self.replaced(weight=Part.of_array(_ASCENDING[codes], DType.F8E4M3))

    @property
    def kind(self) -> str:
        """Always ``fp8``."""
        return "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return self.parts["weight"].shape

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        scales = {name: Part(DType.F32, (), blob[name]) for name in _SCALES}
        return cls.made_of(weight=Part.of_fields(blob["weight"]), **scales)

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {
            "weight": self.parts["weight"].fields(),
            **{name: self.parts[name].payload for name in _SCALES},
            "dtype": DType.F8E4M3.code,
        }

    @staticmethod
    def validate(blob: Scope) -> None:
        """The weight is F8E4M3 and has at least one dimension."""
        weight = blob["weight"]
        if weight["dtype"] is not DType.F8E4M3:
            raise Violation(
                "wrong dtype", rule="FP8-01", field="weight.dtype", expected="9 F8E4M3", got=weight["dtype"].name
            )
        if not weight["shape"]:
            raise Violation(
                "weight without dimensions", rule="BLOB-12", field="weight.ndim", expected="at least 1", got=0
            )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Codes are not NaN, scales are finite."""
        yield from not_finite(blob["weight"], "weight.data")
        for name in _SCALES:
            value = np.frombuffer(blob[name], "<f4")[0]
            if not np.isfinite(value):
                yield PayloadProblem(name, 0, "scale is not finite", "a finite number", str(value))

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.fp8 import cpu

        return cpu.dequantize(self, out, form)

    def stored_on_gpu(self) -> Stored | None:
        """See :meth:`QuantizedTensor.stored_on_gpu`."""
        from uqff.families.fp8 import gpu

        return gpu.stored(self)

    def _decoding(self) -> Decoding | None:
        from uqff.families.fp8 import cpu

        return cpu.decoding(self)

    def _dequantize(self) -> torch.Tensor:
        return reference.dequantize(self.weight, self.dequant_w_scale)

    def alignment(self, dim: int) -> int:
        """1 along every dimension: all weights share one scale."""
        self._dim(dim)
        return 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, 1, weight=1)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "weight")

    @classmethod
    def check_stack(cls, records: Sequence[Self]) -> None:
        """See :meth:`QuantizedTensor.check_stack`: one scale belongs to the whole tensor."""
        check_shared(records, *_SCALES)

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "weight")

    def _unstack(self) -> Self:
        return unstack_parts(self, "weight")

    STACKS_BY_VALUE: ClassVar[bool] = True

    LAYER_NAME: ClassVar[str] = "fp8-linear"
    STACKS_LOAD: ClassVar[bool] = False

    @property
    def nominal_dtype(self) -> DType:
        """F8E4M3."""
        return DType.F8E4M3

    def becomes(self, kind: str) -> bool:
        """F8Q8 only: the engine stops with "not yet implemented" at anything else."""
        return kind == "f8q8"

    def transposed(self) -> Self:
        """See :meth:`LayerRules.transposed`; the scales are those of all."""
        return self.replaced(weight=self.parts["weight"].transposed())

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), self.nominal_dtype)


def _search() -> Any:
    if not simd.enabled():
        return lambda w, importance, made: reference.search(
            w, importance, made, reference.errors, reference.scaled_codes
        )
    from uqff.families.fp8 import cpu

    return cpu.search


def _quantizer() -> Any:
    if not simd.enabled():
        return reference.quantize
    from uqff.families.fp8 import cpu

    return cpu.quantize
