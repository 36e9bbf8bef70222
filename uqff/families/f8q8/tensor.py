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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType, Family, Version
from uqff.errors import ShardError
from uqff.families.base import QuantizedTensor
from uqff.families.best import Parts, better_blocks
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine
from uqff.families.f8q8 import reference
from uqff.families.f8q8.reference import BLOCK_SIZE
from uqff.families.loaded import Loaded, by_runs
from uqff.families.part import Part, joined
from uqff.families.payload import PayloadProblem, first_bad
from uqff.families.slicing import runs
from uqff.schema.bricks import U32, Derived, Dims, Scalar, Scope, Span, Vector, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.decoding import Decoding

__all__ = ["BLOCK", "BLOCK_SIZE", "F8Q8"]

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

    family: ClassVar[Family] = Family(5, "F8Q8", Version(0, 2, 0))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
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

    KINDS: ClassVar[tuple[str, ...]] = ("f8q8",)
    SINCE: ClassVar[Engine] = "0.8"

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        count = -(-math.prod(shape) // BLOCK_SIZE)
        return cls.made_of(blocks=Part.planned((count, BLOCK.fixed_size), DType.U8), weight_shape=tuple(shape))

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`."""
        quantize = _quantizer()
        if effort.name == "engine":
            (blocks,) = by_runs(loaded, BLOCK_SIZE, lambda run: (quantize(run),))
        else:
            search = _search()
            (blocks,) = better_blocks(
                loaded,
                BLOCK_SIZE,
                effort.importance,
                lambda x: (quantize(x),),
                lambda x, w: (search(x, w),),
                cls._numbers_of,
            )
        return cls.made_of(blocks=Part.of_array(blocks, DType.U8), weight_shape=loaded.shape)

    @classmethod
    def _numbers_of(cls, parts: Parts) -> npt.NDArray[np.float32]:
        blocks = Part.of_array(np.ascontiguousarray(parts[0]), DType.U8)
        record = cls.made_of(blocks=blocks, weight_shape=(len(parts[0]), BLOCK_SIZE))
        return record.numbers().array().view(np.float32).reshape(-1, BLOCK_SIZE)

    @property
    def scale_inputs(self) -> int:
        """A block, if blocks begin anew with every row; else 0."""
        return BLOCK_SIZE if self.has_whole_rows else 0

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """See :attr:`QuantizedTensor.code_values`."""
        return np.arange(-128.0, 128.0)

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """See :meth:`QuantizedTensor.with_codes`."""
        blocks = np.array(self.parts["blocks"].array()).reshape(-1, BLOCK.fixed_size)
        q = np.full(blocks[:, 1:].size, 128, np.uint8)
        q[: codes.size] = codes.reshape(-1)
        blocks[:, 1:] = q.reshape(len(blocks), -1) - np.uint8(128)
        return self.replaced(blocks=Part.of_array(blocks, DType.U8))

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
        count = blob["data"].nbytes // BLOCK.fixed_size
        return cls.made_of(blocks=Part(DType.U8, (count, BLOCK.fixed_size), blob["data"]), weight_shape=blob["shape"])

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {"shape": self.weight_shape, "data": self.parts["blocks"].payload}

    @classmethod
    def block_layout(cls, fields: Scope) -> Layout | None:
        """See :meth:`QuantizedTensor.block_layout`."""
        return BLOCK

    @staticmethod
    def validate(blob: Scope) -> None:
        """There are exactly as many blocks as the shape needs."""
        if not blob["shape"]:
            raise Violation("weight without dimensions", rule="BLOB-12", field="ndim", expected="at least 1", got=0)
        expected = -(-math.prod(blob["shape"]) // BLOCK_SIZE)
        got = blob["data"].nbytes // BLOCK.fixed_size
        if got != expected:
            raise Violation(
                "block count does not fit shape", rule="F8Q8-01", field="num_blocks", expected=expected, got=got
            )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """No scale is NaN, and the padding after the last element is zero."""
        blocks = np.frombuffer(blob["data"], np.uint8).reshape(-1, BLOCK.fixed_size)
        yield from first_bad((blocks[:, 0] & 0x7F) == 0x7F, "data", BLOCK.fixed_size, "a scale that is a number")
        padding = blocks[:, 1:].reshape(-1)[math.prod(blob["shape"]) :]
        if padding.any():
            at = blob["data"].nbytes - len(padding) + int(np.argmax(padding != 0))
            yield PayloadProblem("data", at, "padding after the last element", "0", str(padding[padding != 0][0]))

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.f8q8 import cpu

        return cpu.dequantize(self, out, form)

    def stored_on_gpu(self) -> Stored | None:
        """See :meth:`QuantizedTensor.stored_on_gpu`."""
        from uqff.families.f8q8 import gpu

        return gpu.stored(self)

    def _decoding(self) -> Decoding | None:
        from uqff.families.f8q8 import cpu

        return cpu.decoding(self)

    def _dequantize(self) -> torch.Tensor:
        return reference.dequantize(self.blocks).reshape(-1)[: self.numel].reshape(self.shape)

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
        # Only the end of the last run can lie within a block, whose padding is then part of the slice.
        begin, end = start * step // BLOCK_SIZE, -(-(start + length) * step // BLOCK_SIZE)
        blocks = self._runs(count).narrow(1, begin, end - begin)
        return self.replaced(blocks=blocks.view((count * (end - begin), BLOCK.fixed_size)), weight_shape=shape)

    def _runs(self, count: int) -> Part:
        """The blocks of each of ``count`` runs, ``[count, blocks, 33]``."""
        blocks = self.parts["blocks"]
        return blocks.view((count, blocks.shape[0] // count, BLOCK.fixed_size))

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        count, _, _ = runs(self.shape, dim)
        blocks = joined([each._runs(count) for _, each in slices], 1)
        return self.replaced(blocks=blocks.view((count * blocks.shape[1], BLOCK.fixed_size)))

    @property
    def has_whole_rows(self) -> bool:
        """If blocks begin anew with every row."""
        return self.shape[-1] % BLOCK_SIZE == 0

    @classmethod
    def check_stack(cls, records: Sequence[Self]) -> None:
        """See :meth:`QuantizedTensor.check_stack`: the last block of each must be full."""
        first = records[0]
        if len(records) > 1 and first.numel % BLOCK_SIZE:
            raise ShardError(
                "weights do not stack: f8q8 blocks would run across experts",
                expected=f"elements in multiples of {BLOCK_SIZE}",
                got=f"{list(first.shape)}, {first.numel} elements",
            )

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        blocks = joined([record.parts["blocks"] for record in records], 0)
        return records[0].replaced(blocks=blocks, weight_shape=(len(records), *records[0].shape))

    def _unstack(self) -> Self:
        return self.replaced(weight_shape=self.shape[1:])

    def tiles(self) -> Iterator[tuple[Callable[[Any], Any], Self]]:
        """Blocks run across rows, and so do the pieces."""
        blocks, step = self.parts["blocks"], self.TILE // BLOCK_SIZE
        for start in range(0, blocks.shape[0], step):
            count = min(step, blocks.shape[0] - start)
            span = slice(BLOCK_SIZE * start, min(BLOCK_SIZE * (start + count), self.numel))

            def taken(values: Any, span: slice = span) -> Any:
                return values.reshape(-1)[span]

            yield taken, self.replaced(blocks=blocks.narrow(0, start, count), weight_shape=(1, span.stop - span.start))

    LAYER_NAME: ClassVar[str] = "f8q8-linear"
    STACKS_LOAD: ClassVar[bool] = False
    STAYS: ClassVar[bool] = True

    @property
    def nominal_dtype(self) -> DType:
        """F32."""
        return DType.F32

    def becomes(self, kind: str) -> bool:
        """Any type."""
        return True

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), self.nominal_dtype)


def _search() -> Any:
    if not simd.enabled():
        return reference.search
    from uqff.families.f8q8 import cpu

    return cpu.search


def _quantizer() -> Any:
    if not simd.enabled():
        return reference.quantize
    from uqff.families.f8q8 import cpu

    return cpu.quantize
