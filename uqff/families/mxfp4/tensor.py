"""MXFP4: 4-bit floats (e2m1) in blocks of 32 along the input dimension, one power-of-two scale (e8m0) per block.

::

    offset  0            4       5          6
            version u32  type=6  bias_flag  R blocks (U8 [..., in/2])  R scales (U8 [..., in/32])  [R bias]

    byte j of a row of blocks:   h h h h l l l l      l: element 2j,  h: element 2j + 1
    nibble:                      s e e m              sign, exponent, mantissa: the values of E2M1

Dequantise: ``E2M1[nibble] * float32 with exponent field = scale``.  Scale code 0 therefore means 0.0 (not 2**-127) and
255 means infinity, as in the engine.

Authority: mistral.rs, ``mistralrs-quant/src/mxfp4/mod.rs`` (``serialize_with_bias``, ``dequantize_weights``).
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
from uqff.families.best import Parts, better_blocks
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine, Resolution, misaligned_row, wrong_shape
from uqff.families.loaded import Loaded, by_runs, rows_of
from uqff.families.mxfp4 import reference
from uqff.families.mxfp4.reference import BLOCK_SIZE, E2M1
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem, first_bad
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.schema.bricks import Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.decoding import Decoding

__all__ = ["MXFP4"]

_ASCENDING = np.array([*range(15, 8, -1), *range(8)], np.uint8)
"""The nibbles of all numbers from -6 to 6; of the zeros, the positive one."""


@dataclass(frozen=True, eq=False, repr=False)
class MXFP4(QuantizedTensor):
    """A weight of 4-bit floats.

    Attributes:
        blocks: uint8 ``[..., out, in/2]``, two nibbles a byte, the lower one first.
        scales: uint8 ``[..., out, in/32]``, exponents with bias 127.
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    family: ClassVar[Family] = Family(6, "MXFP4", Version(0, 2, 0))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
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

    KINDS: ClassVar[tuple[str, ...]] = ("mxfp4",)
    SINCE: ClassVar[Engine] = "0.8"

    @classmethod
    def resolve(
        cls, kind: str, shape: tuple[int, ...], engine: Engine, group_size: int, version: Version | None = None
    ) -> Resolution:
        """Matrices of whole blocks only."""
        if len(shape) != 2:
            raise wrong_shape(kind, "a matrix: the engine quantises no stack of experts to it", list(shape))
        if shape[-1] % BLOCK_SIZE:
            raise misaligned_row(kind, BLOCK_SIZE, shape)
        return Resolution(kind)

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        *outer, last = shape
        blocks, scales = (Part.planned((*outer, last // n), DType.U8) for n in (2, BLOCK_SIZE))
        return cls.made_of(blocks=blocks, scales=scales)

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`."""
        quantize = _quantizer()
        if effort.name == "engine":
            made = by_runs(loaded, BLOCK_SIZE, lambda run: quantize(run.reshape(-1, BLOCK_SIZE)))
        else:
            made = better_blocks(loaded, BLOCK_SIZE, effort.importance, quantize, _search(), cls._numbers_of)
        blocks, scales = (Part.of_array(rows_of(part, loaded.shape, BLOCK_SIZE), DType.U8) for part in made)
        return cls.made_of(blocks=blocks, scales=scales)

    @classmethod
    def _numbers_of(cls, parts: Parts) -> npt.NDArray[np.float32]:
        blocks, scales = (Part.of_array(np.ascontiguousarray(part), DType.U8) for part in parts)
        return cls.made_of(blocks=blocks, scales=scales).numbers().array().view(np.float32).reshape(-1, BLOCK_SIZE)

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """See :attr:`QuantizedTensor.code_values`."""
        return np.array(E2M1)[_ASCENDING]

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """See :meth:`QuantizedTensor.with_codes`."""
        nibbles = _ASCENDING[codes]
        blocks = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        return self.replaced(blocks=Part.of_array(blocks, DType.U8))

    @property
    def kind(self) -> str:
        """Always ``mxfp4``."""
        return "mxfp4"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.parts["blocks"].shape
        return (*outer, 2 * row)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls.made_of(blocks=Part.of_fields(blob["blocks"]), scales=Part.of_fields(blob["scales"]))

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {name: part.fields() for name, part in self.parts.items()}

    @staticmethod
    def validate(blob: Scope) -> None:
        """Both parts are U8, and each row has one scale for every 16 bytes of nibbles."""
        blocks, scales = blob["blocks"], blob["scales"]
        for name, part in (("blocks", blocks), ("scales", scales)):
            if part["dtype"] is not DType.U8:
                raise Violation(
                    "wrong dtype", rule="MXFP4-01", field=f"{name}.dtype", expected="0 U8", got=part["dtype"].name
                )
        if not blocks["shape"]:
            raise Violation(
                "weight without dimensions", rule="BLOB-12", field="blocks.ndim", expected="at least 1", got=0
            )
        *outer, row = blocks["shape"]
        if row % (BLOCK_SIZE // 2):
            raise Violation(
                "row is not whole blocks",
                rule="MXFP4-02",
                field="blocks.shape",
                expected=f"a multiple of {BLOCK_SIZE // 2}",
                got=row,
            )
        expected = (*outer, row // (BLOCK_SIZE // 2))
        if scales["shape"] != expected:
            raise Violation(
                "shape does not fit blocks",
                rule="MXFP4-03",
                field="scales.shape",
                expected=list(expected),
                got=list(scales["shape"]),
            )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """No scale is 255: it would be infinite."""
        scales = np.frombuffer(blob["scales"]["data"], np.uint8)
        yield from first_bad(scales == 255, "scales.data", 1, "an exponent from 0 to 254")

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.mxfp4 import cpu

        return cpu.dequantize(self, out, form)

    def stored_on_gpu(self) -> Stored | None:
        """See :meth:`QuantizedTensor.stored_on_gpu`."""
        from uqff.families.mxfp4 import gpu

        return gpu.stored(self)

    def _decoding(self) -> Decoding | None:
        from uqff.families.mxfp4 import cpu

        return cpu.decoding(self)

    def _dequantize(self) -> torch.Tensor:
        return reference.dequantize(self.blocks, self.scales)

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

    LAYER_NAME: ClassVar[str] = "mxfp4-layer"
    TAKES_DELTA: ClassVar[bool] = False

    @property
    def nominal_dtype(self) -> DType:
        """BF16."""
        return DType.BF16

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), self.nominal_dtype)


def _search() -> Any:
    if not simd.enabled():
        return reference.search
    from uqff.families.mxfp4 import cpu

    return cpu.search


def _quantizer() -> Any:
    if not simd.enabled():
        return reference.quantize
    from uqff.families.mxfp4 import cpu

    return cpu.quantize
