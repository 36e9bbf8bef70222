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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType, Family, Version
from uqff.families.afq import reference
from uqff.families.base import QuantizedTensor
from uqff.families.best import Parts, better_blocks
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine, Resolution, misaligned_row, no_group_size
from uqff.families.loaded import Loaded, by_runs, rows_of
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem, not_finite
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.numerics import fitting
from uqff.numerics.packing import pack_row
from uqff.schema.bricks import U8, Checked, Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.decoding import Decoding

__all__ = ["AFQ"]

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)

UNQUANT_SINCE = Version(1, 1, 0)
"""The first 1.x that has unquantised layers: engine 0.8.23, which writes it, has them in place of AFQ; 0.8.12 fails."""

SCALE_DTYPES = (DType.F32, DType.F16, DType.BF16)

FORMS = {DType.F32: fitting.F32, DType.F16: fitting.F16, DType.BF16: fitting.BF16}
"""How scales and biases of a load dtype are rounded."""


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

    family: ClassVar[Family] = Family(4, "AFQ", Version(0, 1, 3))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "w_q" / TENSOR * "the packed codes, U32 `[..., out, in·bits/32]`",
        "scales" / TENSOR * "scale of each group, F32, F16 or BF16 `[..., out, in/group_size]`",
        "biases" / TENSOR * "value of code 0 of each group, like `scales`",
        "bits" / Checked.choice(U8, *BITS, rule="AFQ-01") * "bits per code: 2, 3, 4, 6 or 8",
        "group_size" / Checked.choice(U8, *GROUP_SIZES, rule="AFQ-02") * "inputs per group: 32, 64 or 128",
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

    KINDS: ClassVar[tuple[str, ...]] = tuple(f"afq{bits}" for bits in BITS)
    PROMOTED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("afq2", "afq3", "afq4"), "afq6"),
        **dict.fromkeys(("afq6", "afq8"), "afq8"),
    }
    BY_EXPERT: ClassVar[bool] = True

    @classmethod
    def group_size_of(cls, kind: str, group_size: int | None) -> int:
        """32, 64 or 128."""
        if group_size is not None and group_size not in GROUP_SIZES:
            raise no_group_size(", ".join(map(str, GROUP_SIZES)), group_size)
        return GROUP if group_size is None else group_size

    @classmethod
    def resolve(
        cls, kind: str, shape: tuple[int, ...], engine: Engine, group_size: int, version: Version | None = None
    ) -> Resolution:
        """Rows are whole groups, else engines fail or, since UQFF 1.1, leave the weight as it is."""
        if shape[-1] % group_size == 0:
            return Resolution(kind)
        if engine == "0.6" or (engine == "0.8" and (version is None or version < UNQUANT_SINCE)):
            raise misaligned_row(kind, group_size, shape)
        return Resolution("unquant", f"the last dimension is not a multiple of {group_size}")

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        *outer, last = shape
        bits = int(kind[-1])
        scales = Part.planned((*outer, last // group_size), dtype)
        w_q = Part.planned((*outer, last * bits // 8), DType.U8)
        return cls.made_of(w_q=w_q, scales=scales, biases=scales, bits=bits, group_size=group_size)

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`; scales and biases are rounded to the load dtype after the codes are made."""
        quantize, bits = _quantizer(), int(kind[-1])

        def as_engine(run: npt.NDArray[np.float32]) -> Parts:
            codes, *floats = quantize(run.reshape(-1, group_size), bits, group_size)
            return (codes, *(_cast(each, loaded.dtype) for each in floats))

        if effort.name == "engine":
            made = by_runs(loaded, group_size, as_engine)
        else:
            search = _search()

            def numbers(parts: Parts) -> npt.NDArray[np.float32]:
                record = cls._encoded([np.ascontiguousarray(each) for each in parts], loaded.dtype, bits, group_size)
                return record.numbers().array().view(np.float32).reshape(-1, group_size)

            def nearest(x: npt.NDArray[np.float32], w: npt.NDArray[np.float32]) -> Parts:
                codes, *floats = search(x, w, bits, FORMS[loaded.dtype])
                return (codes, *(_cast(each, loaded.dtype) for each in floats))

            made = better_blocks(loaded, group_size, effort.importance, as_engine, nearest, numbers)
        parts = [rows_of(part, loaded.shape, group_size) for part in made]
        return cls._encoded(parts, loaded.dtype, bits, group_size)

    @classmethod
    def _encoded(cls, parts: Sequence[npt.NDArray[Any]], dtype: DType, bits: int, group_size: int) -> Self:
        codes, scales, biases = parts
        return cls.made_of(
            w_q=Part.of_array(codes, DType.U8),
            scales=Part.of_array(scales, dtype),
            biases=Part.of_array(biases, dtype),
            bits=bits,
            group_size=group_size,
        )

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """See :attr:`QuantizedTensor.code_values`."""
        return np.arange(2.0**self.bits)

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """See :meth:`QuantizedTensor.with_codes`."""
        return self.replaced(w_q=Part.of_array(pack_row(codes, self.bits), DType.U8))

    @property
    def kind(self) -> str:
        """``afq2``, ``afq3``, ``afq4``, ``afq6`` or ``afq8``."""
        return f"afq{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.parts["w_q"].shape
        return (*outer, row * 8 // self.bits)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls.made_of(
            w_q=Part.of_fields(blob["w_q"]).as_bytes(),
            scales=Part.of_fields(blob["scales"]),
            biases=Part.of_fields(blob["biases"]),
            bits=blob["bits"],
            group_size=blob["group_size"],
        )

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {
            "w_q": self.parts["w_q"].fields(DType.U32),
            "scales": self.parts["scales"].fields(),
            "biases": self.parts["biases"].fields(),
            "bits": self.bits,
            "group_size": self.group_size,
        }

    @staticmethod
    def validate(blob: Scope) -> None:
        """Rows hold whole groups; scales and biases have one float per group."""
        w_q, scales, biases = blob["w_q"], blob["scales"], blob["biases"]
        if w_q["dtype"] is not DType.U32:
            raise Violation("wrong dtype", field="w_q.dtype", rule="AFQ-03", expected="1 U32", got=w_q["dtype"].name)
        if scales["dtype"] not in SCALE_DTYPES:
            allowed = ", ".join(d.name for d in SCALE_DTYPES)
            raise Violation(
                "wrong dtype", field="scales.dtype", rule="AFQ-04", expected=allowed, got=scales["dtype"].name
            )
        if biases["dtype"] is not scales["dtype"]:
            raise Violation(
                "wrong dtype",
                field="biases.dtype",
                rule="AFQ-05",
                expected=scales["dtype"].name,
                got=biases["dtype"].name,
            )
        if not w_q["shape"]:
            raise Violation("weight without dimensions", rule="BLOB-12", field="w_q.ndim", expected="at least 1", got=0)
        *outer, words = w_q["shape"]
        group_bits = blob["group_size"] * blob["bits"]
        if 32 * words % group_bits:
            raise Violation(
                "row is not whole groups",
                rule="AFQ-06",
                field="w_q.shape",
                expected=f"a multiple of {group_bits // 32}",
                got=words,
            )
        expected = (*outer, 32 * words // group_bits)
        for name, part in (("scales", scales), ("biases", biases)):
            if part["shape"] != expected:
                raise Violation(
                    "shape does not fit w_q",
                    rule="AFQ-07",
                    field=f"{name}.shape",
                    expected=list(expected),
                    got=list(part["shape"]),
                )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Scales and biases are finite."""
        yield from not_finite(blob["scales"], "scales.data")
        yield from not_finite(blob["biases"], "biases.data")

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.afq import cpu

        return cpu.dequantize(self, out, form)

    def stored_on_gpu(self) -> Stored | None:
        """See :meth:`QuantizedTensor.stored_on_gpu`."""
        from uqff.families.afq import gpu

        return gpu.stored(self)

    def _decoding(self) -> Decoding | None:
        from uqff.families.afq import cpu

        return cpu.decoding(self)

    def _dequantize(self) -> torch.Tensor:
        return reference.dequantize(self.w_q, self.scales, self.biases, self.bits, self.group_size)

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

    LAYER_NAME: ClassVar[str] = "afq-layer"
    STACKS_RUN_ON_CPU: ClassVar[bool] = False

    @property
    def nominal_dtype(self) -> DType:
        """That of the scales."""
        return self.parts["scales"].dtype

    @property
    def load_dtype(self) -> DType:
        """That of the scales, which then are stored in it again."""
        return self.nominal_dtype

    @property
    def own_group_size(self) -> int | None:
        """Its own."""
        return self.group_size

    def becomes(self, kind: str) -> bool:
        """F8Q8 only: the engine stops with "not yet implemented" at anything else."""
        return kind == "f8q8"

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), self.nominal_dtype, self.group_size)


def _cast(values: npt.NDArray[np.float32], dtype: DType) -> npt.NDArray[Any]:
    """Scales or biases, their bits in the load dtype."""
    return Floats(np.ascontiguousarray(values).view(np.uint32), DType.F32).cast(dtype).bits


def _search() -> Any:
    if not simd.enabled():
        return reference.search
    from uqff.families.afq import cpu

    return cpu.search


def _quantizer() -> Any:
    if not simd.enabled():
        return reference.quantize
    from uqff.families.afq import cpu

    return cpu.quantize
