"""Checkpoints of bitsandbytes: NF4 and FP4, their statistics quantised again or not, and LLM.int8. All are foreign.

::

    4 bits  <path>.weight                        bytes [out·in/2, 1]    two codes a byte, the first in the high bits
            .weight.absmax                       F32 [blocks], or U8 [blocks] if nested
            .weight.quant_map                    F32 [16]
            .weight.nested_absmax                F32 [⌈blocks/nested_blocksize⌉]
            .weight.nested_quant_map             F32 [256]
            .weight.quant_state.bitsandbytes__nf4, or __fp4    a JSON object as U8: shape, blocksize, quant_type,
                                                 nested_blocksize, nested_offset, ...
    8 bits  <path>.weight                        I8 [out, in]
            .SCB                                 F32 [out]
            .weight_format                       U8 [], 0: row by row; optional

A block is a run of the flattened weight, which may go on in the next row; a group of the record is the largest that
fits both.  Nested: ``absmax = nested_quant_map[code] * nested_absmax + nested_offset`` in float32.

Authority: bitsandbytes 0.50, ``functional.py`` (``QuantState``, ``dequantize_4bit``), ``backends/default/ops.py``,
``nn/modules.py`` (``Linear8bitLt``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import Companions, float32_of
from uqff.checkpoints.int8_rows import Int8Rows
from uqff.checkpoints.method import Cut, Found, Method
from uqff.checkpoints.table import TableCodes
from uqff.codes import DType
from uqff.errors import ShapeError, UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.families.part import Part
from uqff.limits import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["BitsAndBytes"]

BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST: Final = float(np.finfo(np.float32).max)
DTYPES: Final = ("float32", "float16", "bfloat16")
"""What the weight had; it is dequantised to float32 all the same."""
STATE: Final = "quant_state.bitsandbytes__"
NAMES_4: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4", f"{STATE}fp4")


class BitsAndBytes(Method):
    """``quant_method`` ``bitsandbytes``; what is quantised is told by its tensors."""

    NAMES: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    @classmethod
    def means(cls, name: object, quantization: Mapping[str, Any]) -> bool:
        """See :meth:`Method.means`; configurations of old do not name it."""
        says = any(quantization.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
        return name in cls.NAMES or (name is None and says)

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`; there are no settings."""
        return cls()

    def find(self, tensors: TensorFiles) -> Found:
        """Weights with an absmax, a state or an SCB beside them."""
        found: Found = {}
        for name in tensors:
            for end in (".SCB", ".weight.absmax", f".weight.{STATE}nf4", f".weight.{STATE}fp4"):
                if name.endswith(end):
                    path = name.removesuffix(end)
                    roles = {"weight": f"{path}.weight", "SCB": f"{path}.SCB", "weight_format": f"{path}.weight_format"}
                    if end != ".SCB":
                        roles = {"weight": f"{path}.weight"} | {each: f"{path}.weight.{each}" for each in NAMES_4}
                    found[path] = {role: each for role, each in roles.items() if each in tensors}
        return found

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`; reads the state."""
        if "SCB" in stored:
            self._check_rows(stored)
            out, columns = stored.shape("weight")
            weight, scales = Part.planned((out, columns), DType.U8), Part.planned((out, 1), DType.F32)
            return Int8Rows.made_of(weight=weight, scales=scales)
        state = _State(stored)
        return TableCodes.made_of(
            codes=Part.planned((state.out, state.columns // 2), DType.U8),
            scales=Part.planned((state.out, state.columns // state.size), DType.F32),
            table=Part.planned((16,), DType.F32),
            size=state.size,
            name=state.name,
        )

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`."""
        if "SCB" in stored:
            self._check_rows(stored)
            scales = stored.finite("SCB", stored.part("SCB")).view((stored.shape("weight")[0], 1))
            rows = Int8Rows.made_of(weight=stored.part("weight"), scales=scales)
            return rows if cut is None else rows.narrow(*cut)
        return _State(stored).record(cut)

    @staticmethod
    def _check_rows(stored: Companions) -> None:
        stored.check("weight", ("I8",))
        if len(stored.shape("weight")) != 2:
            raise stored.problem("wrong shape", "weight", "a matrix", list(stored.shape("weight")), ShapeError)
        stored.check("SCB", ("F32",), stored.shape("weight")[:1])
        if "weight_format" in stored:
            form = stored.part("weight_format", ("U8",)).array()
            if form.any():
                raise stored.problem(
                    "weights in tiles", "weight_format", "0, row by row", int(form.max()), UnsupportedError
                )


class _State:
    """What a 4-bit weight is, checked: all but its numbers."""

    def __init__(self, stored: Companions) -> None:
        self.stored = stored
        self.role = next((f"{STATE}{each}" for each in ("nf4", "fp4") if f"{STATE}{each}" in stored), f"{STATE}...")
        self.name = self.role.removeprefix(STATE)
        self.state = self._read()
        shape = self.state.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(each) is int and each > 0 for each in shape):
            raise self._wrong("shape", "[out, in]", shape)
        self.out, self.columns = shape
        self.block = self._number("blocksize")
        if self.columns % 2:
            raise stored.problem(
                "bytes are shared by rows", self.role, "an even number of inputs", self.columns, UnsupportedError
            )
        self.size = math.gcd(self.columns, self.block)
        if self.state.get("quant_type") != self.name:
            raise self._wrong("quant_type", self.name, self.state.get("quant_type"))
        if self.state.get("dtype", "float32") not in DTYPES:
            raise self._wrong("dtype", f"one of {', '.join(DTYPES)}", self.state["dtype"])
        self.is_nested = "nested_absmax" in stored or "nested_offset" in self.state
        self._check()

    def _wrong(self, key: str, expected: object, got: object) -> Any:
        return self.stored.problem(f"wrong {key} in the state", self.role, expected, got)

    def _number(self, key: str) -> int:
        value = self.state.get(key)
        if type(value) is not int or value not in BLOCKS:
            raise self._wrong(key, f"one of {', '.join(map(str, BLOCKS))}", value)
        return value

    def _read(self) -> dict[str, Any]:
        raw = self.stored.part(self.role, ("U8",))
        try:
            if raw.nbytes > MAX_HEADER_BYTES:
                raise ValueError("too long")
            state = json.loads(raw.array().tobytes())
        except (ValueError, RecursionError) as error:
            raise self.stored.problem("not a JSON object", self.role, str(error)) from None
        if not isinstance(state, dict):
            raise self.stored.problem("not a JSON object", self.role, "an object", type(state).__name__)
        return state

    def _check(self) -> None:
        stored, numel = self.stored, self.out * self.columns
        size = stored.tensors.nbytes(stored.name("weight"))
        if size != numel // 2:
            raise stored.problem("wrong number of bytes", "weight", numel // 2, size, ShapeError)
        self.blocks = -(-numel // self.block)
        stored.check("absmax", ("U8",) if self.is_nested else ("F32",), (self.blocks,))
        stored.check("quant_map", ("F32",), (16,))
        if self.is_nested:
            self.nested_block = self._number("nested_blocksize")
            stored.check("nested_absmax", ("F32",), (-(-self.blocks // self.nested_block),))
            stored.check("nested_quant_map", ("F32",), (256,))
            offset: Any = self.state.get("nested_offset")
            if type(offset) not in (int, float) or not abs(offset) <= LARGEST:  # nor NaN, nor an integer beyond floats
                raise self._wrong("nested_offset", "a finite number", offset)

    def _floats(self, role: str) -> npt.NDArray[np.float32]:
        return float32_of(self.stored.finite(role, self.stored.part(role)))

    def _absmax(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Those of some blocks."""
        taken = self.stored.part("absmax").narrow(0, first, last - first)
        if not self.is_nested:
            return float32_of(self.stored.finite("absmax", taken))
        outer = self._floats("nested_absmax")[np.arange(first, last) // self.nested_block]
        made: npt.NDArray[np.float32] = self._floats("nested_quant_map")[taken.array()] * outer
        made += np.float32(self.state["nested_offset"])
        return made

    def record(self, cut: Cut | None) -> TableCodes:
        """The record, or a slice of it."""
        rows, columns = [0, self.out], [0, self.columns]
        if cut is not None:
            (rows, columns)[cut[0]][:] = [cut[1], cut[1] + cut[2]]
        codes = self.stored.part("weight").array().reshape(self.out, -1)
        taken = codes[rows[0] : rows[1], columns[0] // 2 : columns[1] // 2]
        swapped = taken << np.uint8(4) | taken >> np.uint8(4)
        starts = np.arange(rows[0], rows[1])[:, None] * self.columns + np.arange(columns[0], columns[1], self.size)
        of = starts // self.block
        first = int(of[0, 0])
        scales = self._absmax(first, int(of[-1, -1]) + 1)[of - first]
        return TableCodes.made_of(
            codes=Part.of_array(swapped, DType.U8),
            scales=Part.of_array(scales, DType.F32),
            table=Part.of_array(self._floats("quant_map"), DType.F32),
            size=self.size,
            name=self.name,
        )
