"""GGUF: ggml's block types, each row of the weight cut into blocks.

::

    offset  0            4       5                9          10              14        18
            version u32  type=0  data_length u32  bias_flag  ggml_dtype u32  ndim u32  shape          blocks  [R bias]

The shape is in elements and row major (not reversed as in GGUF files).  The bias flag stands *after* the length here
and before the body in every other family.  ``data_length`` wraps at 4 GiB in old writers; shape and type give the true
size.

Authority: mistral.rs, ``mistralrs-quant/src/gguf/mod.rs`` (``serialize_with_bias``, ``deserialize``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType, Family, Version
from uqff.families.base import QuantizedTensor
from uqff.families.best import Parts, better_blocks, importance_of_run
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine, Resolution, misaligned_row
from uqff.families.gguf import reference_best, reference_imatrix, reference_product, reference_quantize
from uqff.families.gguf.blocks import BLOCK_TYPES, QK, QK_K, BlockType, block_type_of_code, block_type_of_kind
from uqff.families.gguf.recode import code_range, with_codes
from uqff.families.gguf.reference_dequantize import DEQUANTIZERS
from uqff.families.loaded import Loaded
from uqff.families.multiplying import EngineProduct
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem, first_bad, not_finite
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.schema.bricks import U32, Checked, Derived, Dims, Scope, Span, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.simd.threads import run_ranges

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.chain import Task
    from uqff.simd.decoding import Decoding

__all__ = ["GGUF"]


LEGACY = {"q2k": "q4_0", "q3k": "q4_0", "q4k": "q4_1", "q5k": "q5_0", "q6k": "q5_1", "q8k": "q8_1"}
"""What a K type falls back to where rows are whole blocks of 32, not of 256."""
LEGACY_KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1")

REFERENCE_BLOCKS = 1 << 12
"""Blocks that a reference quantiser gets together: it needs some 50 bytes per weight."""

GRAIN = 1 << 8
"""Blocks of a range at least, where references run on several threads."""


def _decode_type(code: int) -> BlockType:
    block_type = block_type_of_code(code)
    if block_type is None:
        known = ", ".join(f"{t.code} {t.name}" for t in BLOCK_TYPES)
        raise Violation("unknown ggml type", rule="GGUF-01", expected=f"one of {known}", got=code)
    return block_type


def _data_bytes(blob: Any) -> int:
    block_type: BlockType = blob["ggml_dtype"]
    shape = blob["shape"]
    if not shape:
        raise Violation("weight without dimensions", rule="BLOB-12", field="ndim", expected="at least 1", got=0)
    if shape[-1] % block_type.block_size:
        raise Violation(
            "row is not whole blocks",
            rule="GGUF-02",
            field="shape",
            expected=f"a last dimension in multiples of {block_type.block_size}",
            got=shape[-1],
        )
    size: int = math.prod(shape) // block_type.block_size * block_type.type_size
    return size


@dataclass(frozen=True, eq=False, repr=False)
class GGUF(QuantizedTensor):
    """A weight of ggml blocks.

    Attributes:
        data: uint8 ``[..., in / block_size · type_size]``, the blocks of each row.
        block_type: which ggml type.
    """

    data: torch.Tensor
    block_type: BlockType

    family: ClassVar[Family] = Family(0, "GGUF", Version(0, 1, 0))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
        "data_length" / Derived(U32, _data_bytes) * "bytes of `data`",
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0; after the length in this family only",
        "ggml_dtype" / Checked(U32, _decode_type, lambda t: t.code) * "ggml type code",
        "ndim" / Derived(U32, lambda b: len(b["shape"])) * "number of dimensions",
        "shape" / Dims("ndim") * "dimensions in elements, outermost first",
        "data" / Span(_data_bytes, "data_length", declared="data_length") * "the blocks, row after row",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "data", (DType.U8,), ("nbytes",)),
        Entry("weight.dtype", "ggml_dtype", (DType.U32,)),
        Entry("weight.shape", "shape", (DType.U32,), ("ndim",)),
    )
    BIAS: ClassVar[BiasRule] = BiasRule(DType.F32, {0: DType.F32})

    KINDS: ClassVar[tuple[str, ...]] = (*LEGACY_KINDS, *LEGACY)
    RESULTS: ClassVar[tuple[str, ...]] = ("f32", "f16", "bf16")
    AUTOMATIC: ClassVar[Mapping[int, str]] = {2: "q2k", 3: "q3k", 4: "q4k", 5: "q5k", 6: "q6k", 8: "q8_0"}
    PROMOTED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("q2k", "q3k", "q4k", "q4_0", "q4_1"), "q6k"),
        **dict.fromkeys(("q5k", "q6k", "q8k", "q5_0", "q5_1", "q8_0", "q8_1"), "q8_0"),
    }
    BY_EXPERT: ClassVar[bool] = True

    @classmethod
    def resolve(
        cls, kind: str, shape: tuple[int, ...], engine: Engine, group_size: int, version: Version | None = None
    ) -> Resolution:
        """A legacy type for rows that are not whole super-blocks; ggml's F32 for those that are not whole blocks."""
        last = shape[-1]
        if last % QK:
            if engine == "0.6":
                raise misaligned_row(kind, QK, shape)
            return Resolution("f32", f"the last dimension is not a multiple of {QK}")
        if kind in LEGACY and last % QK_K:
            return Resolution(LEGACY[kind], f"the last dimension is not a multiple of {QK_K}")
        return Resolution(kind)

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        *outer, last = shape
        block_type = _type_of(kind)
        row = last // block_type.block_size * block_type.type_size
        return cls.made_of(data=Part.planned((*outer, row), DType.U8), block_type=block_type)

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`; the engine decides the code of Q8K's largest element."""
        *outer, last = loaded.shape
        block_type, at = _type_of(kind), 0
        size = block_type.block_size
        if effort.name == "best" and size > 1:
            return cls._encode_best(loaded, block_type, engine, effort)
        importance, before = effort.importance, 0
        blocks = np.empty((math.prod(loaded.shape) // size, block_type.type_size), np.uint8)
        for run in loaded.runs():
            some = blocks[at : at + len(run) // size]
            if importance is not None and block_type.name in reference_imatrix.QUANTIZERS:
                weights = importance_of_run(importance, loaded.shape, before, len(run))
                _put_weighted_blocks(run.reshape(-1, size), weights.reshape(-1, size), block_type, some)
            else:
                _put_blocks(run.reshape(-1, size), block_type, engine, some)
            at, before = at + len(some), before + len(run)
        data = Part.of_array(blocks.reshape(*outer, last // size * block_type.type_size), DType.U8)
        return cls.made_of(data=data, block_type=block_type)

    @classmethod
    def _encode_best(cls, loaded: Loaded, block_type: BlockType, engine: Engine, effort: Effort) -> Self:
        *outer, last = loaded.shape
        size = block_type.block_size
        search = _search()

        def numbers(parts: Parts) -> npt.NDArray[np.float32]:
            record = cls.made_of(data=Part.of_array(np.ascontiguousarray(parts[0]), DType.U8), block_type=block_type)
            return record.numbers().array().view(np.float32).reshape(-1, size)

        def as_engine(x: npt.NDArray[np.float32]) -> Parts:
            made = np.empty((len(x), block_type.type_size), np.uint8)
            _put_blocks(x, block_type, engine, made)
            return (made,)

        (blocks,) = better_blocks(
            loaded, size, effort.importance, as_engine, lambda x, w: (search(block_type.name, x, w),), numbers
        )
        data = Part.of_array(blocks.reshape(*outer, last // size * block_type.type_size), DType.U8)
        return cls.made_of(data=data, block_type=block_type)

    @property
    def kind(self) -> str:
        """``q4_0`` ... ``q8k``, ``f32``, ``f16`` or ``bf16``."""
        return self.block_type.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.parts["data"].shape
        return (*outer, row // self.block_type.type_size * self.block_type.block_size)

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """See :attr:`QuantizedTensor.code_values`."""
        found = code_range(self.block_type.name)
        return None if found is None else np.arange(found[0], found[1] + 1, dtype=np.float64)

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """See :meth:`QuantizedTensor.with_codes`."""
        low, _ = code_range(self.block_type.name) or (0, 0)
        blocks = self.parts["data"].array().reshape(-1, self.block_type.type_size)
        q = codes.reshape(-1, self.block_type.block_size).astype(np.int32) + np.int32(low)
        data = with_codes(self.block_type, blocks, q).reshape(self.parts["data"].shape)
        return self.replaced(data=Part.of_array(data, DType.U8))

    @property
    def blocks(self) -> torch.Tensor:
        """All blocks in order, uint8 ``[n, type_size]``; a view."""
        return self.data.reshape(-1, self.block_type.type_size)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        block_type: BlockType = blob["ggml_dtype"]
        *outer, last = blob["shape"]
        row = last // block_type.block_size * block_type.type_size
        return cls.made_of(data=Part(DType.U8, (*outer, row), blob["data"]), block_type=block_type)

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {"ggml_dtype": self.block_type, "shape": self.shape, "data": self.parts["data"].payload}

    @classmethod
    def block_layout(cls, fields: Scope) -> Layout | None:
        """See :meth:`QuantizedTensor.block_layout`; plain numbers are no blocks."""
        block_type: BlockType | None = fields.get("ggml_dtype")
        return None if block_type is None or block_type.block_size == 1 else block_type.layout

    @staticmethod
    def validate(blob: Scope) -> None:
        """Nothing beyond what the layout states: the size of the data follows from type and shape."""

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Every float of a block is finite."""
        block_type: BlockType = blob["ggml_dtype"]
        if block_type.block_size == 1:
            dtype = DType[block_type.name]
            yield from not_finite({"dtype": dtype, "data": blob["data"]}, "data")
            return
        blocks = np.frombuffer(blob["data"], block_type.numpy)
        assert block_type.numpy.names is not None
        for name in block_type.numpy.names:
            if blocks[name].dtype.kind == "f":
                expected = f"a finite {name} in every block"
                yield from first_bad(~np.isfinite(blocks[name]), "data", block_type.type_size, expected)

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.gguf import cpu_dequantize

        return cpu_dequantize.dequantize(self, out, form)

    def stored_on_gpu(self) -> Stored | None:
        """See :meth:`QuantizedTensor.stored_on_gpu`."""
        from uqff.families.gguf import gpu

        return gpu.stored(self)

    def _decoding(self) -> Decoding | None:
        from uqff.families.gguf import cpu_rows

        return cpu_rows.decoding(self)

    def engine_product(self) -> EngineProduct | None:
        """See :meth:`Multiplying.engine_product`."""
        if self.engine_activations is None:
            return None
        if not simd.enabled():
            return partial(reference_product.multiply, blocks=self.blocks, block_type=self.block_type)
        from uqff.families.gguf import cpu_product

        return cpu_product.product(self)

    def engine_task(
        self, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], laid: dict[Hashable, Task]
    ) -> Task | None:
        """See :meth:`Multiplying.engine_task`."""
        if self.engine_activations is None or not simd.enabled():
            return None
        from uqff.families.gguf import cpu_product

        return cpu_product.task(self, x, y, laid)

    def rounded_as_engine(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """See :meth:`Multiplying.rounded_as_engine`; Q8_1 has sums that are rounded too."""
        if self.engine_activations in (None, "q8_1") or not simd.enabled():
            return None
        from uqff.families.gguf import cpu_activations

        return cpu_activations.rounded(x, self.block_type)

    def _dequantize(self) -> torch.Tensor:
        return DEQUANTIZERS[self.block_type.name](self.blocks).reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """A block along the last dimension, 1 along others."""
        return self.block_type.block_size if self._dim(dim) == len(self.shape) - 1 else 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, self.block_type.block_size, data=self.block_type.type_size)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "data")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "data")

    def _unstack(self) -> Self:
        return unstack_parts(self, "data")

    @property
    def ggml(self) -> tuple[str, Part] | None:
        """What it is."""
        return self.kind, self.parts["data"]

    LAYER_NAME: ClassVar[str] = "gguf"
    NOT_LOADED: ClassVar[tuple[str, ...]] = ("q8_1", "q8k")
    MANUAL_MAPPING: ClassVar[tuple[str, ...]] = ("f32", "f16", "bf16")
    SKIPPED: ClassVar[Mapping[str, str]] = {"f32": "tensor is not quantizable"}

    @property
    def nominal_dtype(self) -> DType:
        """F32, but for F16 and BF16."""
        return {"f16": DType.F16, "bf16": DType.BF16}.get(self.kind, DType.F32)

    @property
    def act_dtype(self) -> DType | None:
        """F32."""
        return DType.F32

    @property
    def plain(self) -> Part | None:
        """F32, F16 and BF16 are plain numbers."""
        is_plain = self.block_type.block_size == 1
        return Part(self.nominal_dtype, self.shape, self.parts["data"].data) if is_plain else None

    def plain_is_cast(self, major: int) -> bool:
        """They are; but since 1.x those in F32 are refused if activations are narrower."""
        return self.nominal_dtype is not DType.F32 or major == 0

    @property
    def engine_activations(self) -> str | None:
        """Q8_0, Q8_1 or Q8K; of stacked experts and plain numbers none."""
        beside = reference_product.ACTIVATIONS.get(self.block_type.name)
        return None if beside is None or len(self.shape) != 2 else beside.kind

    def becomes(self, kind: str) -> bool:
        """Any ggml type, and F8Q8."""
        return self.has_kind(kind) or kind == "f8q8"

    def plus(self, delta: torch.Tensor) -> Self | None:
        """See :meth:`LayerRules.plus`."""
        if self.plain is None:
            return None
        dtype = self.nominal_dtype.torch
        return self.replaced(data=Part.of_tensor(self.dequantize(dtype) + delta.to(dtype)).as_bytes())

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), self.nominal_dtype)


def _type_of(kind: str) -> BlockType:
    block_type = block_type_of_kind(kind)
    assert block_type is not None
    return block_type


def _put_weighted_blocks(
    values: npt.NDArray[np.float32], weights: npt.NDArray[np.float32], block_type: BlockType, out: npt.NDArray[np.uint8]
) -> None:
    """Blocks of a K type as the engine makes them with an importance matrix."""
    quantize = reference_imatrix.QUANTIZERS[block_type.name]
    if simd.enabled():
        from uqff.families.gguf import cpu_imatrix

        quantize = cpu_imatrix.QUANTIZERS.get(block_type.name, quantize)

    def work(lo: int, hi: int) -> None:
        for at in range(lo, hi, REFERENCE_BLOCKS):
            end = min(at + REFERENCE_BLOCKS, hi)
            out[at:end] = quantize(values[at:end], weights[at:end])

    run_ranges(work, len(values), grain=GRAIN)


def _search() -> Any:
    if not simd.enabled():
        return reference_best.quantize
    from uqff.families.gguf import cpu_best

    return cpu_best.quantize


def _put_blocks(
    values: npt.NDArray[np.float32], block_type: BlockType, engine: Engine, out: npt.NDArray[np.uint8]
) -> None:
    """Blocks, uint8 ``[n, type_size]``, of float32 ``[n, block_size]``."""
    if block_type.block_size == 1:
        out[:] = values.astype("<f4", copy=False).view(np.uint8)
        return
    extreme = -127 if engine == "0.9" else -128
    if simd.enabled():
        from uqff.families.gguf import cpu_quantize

        cpu_quantize.quantize(block_type.name, values, extreme=extreme, out=out)
        return
    arguments = (extreme,) if block_type.name == "Q8K" else ()
    for at in range(0, len(values), REFERENCE_BLOCKS):
        part = values[at : at + REFERENCE_BLOCKS]
        out[at : at + REFERENCE_BLOCKS] = reference_quantize.QUANTIZERS[block_type.name](part, *arguments)
