"""Checkpoints of HQQ, as ``hqq`` and transformers write them into safetensors: exact HQQ records.

::

    <path>.W_q      the packed codes: U8, for 3 bits I32, or the same bytes as floats (``view_as_float``)
    <path>.scale    float, one a group: [1, N] for axis 0, [N, 1] for axis 1; [] for a whole weight
    <path>.zero     like scale
    <path>.shape    I64 [2]: out and in
    <path>.nbits, .group_size, .axis, .channel_wise, .view_as_float, .round_zero,
          .quant_scale, .quant_zero                                                   one number each

A number that a weight does not have is taken from ``quant_config.weight_quant_params`` of the configuration.  Codes of
5 and 6 bits come a byte each, as those of 8 do; 1.58 bits are packed as 2.  Without a group size a group is a whole
column (axis 0) or row (axis 1); if not ``channel_wise``, all of the weight.

Dequantise: ``(q - zero) * scale``.

Authority: mobiusml/hqq 0.2.8, ``hqq/core/quantize.py`` (``HQQLinear.state_dict``, ``Quantizer.dequantize``),
``hqq/core/utils.py`` (``encode_safetensor_type``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from uqff.checkpoints.companions import FLOATS, Companions
from uqff.checkpoints.method import Cut, Found, Method, by_suffix
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.families.hqq.codes import planned_codes
from uqff.families.hqq.tensor import HQQ
from uqff.families.part import Part
from uqff.schema.bricks import Violation

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["HQQCheckpoint"]

STORED_BITS: Final[dict[float, int]] = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1.58: 2, 1: 1}
"""How many bits the codes are packed with."""

PACKINGS: Final = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
"""What hqq calls them, by the bits that codes are packed with."""

NUMBERS: Final = ("nbits", "group_size", "axis", "channel_wise", "view_as_float", "round_zero")
FLAGS: Final = ("quant_scale", "quant_zero")
REST: Final = (
    *("zero_scale", "packing", "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "optimize", "bitpack"),
)
"""What is of no use here, and belongs to the weight all the same."""

ROLES: Final = {
    role: f".{role}" for role in ("W_q", "scale", "zero", "shape", *NUMBERS, *FLAGS, "scale_q", "zero_q", *REST)
}
NUMPY: Final = {"U8": "u1", "BOOL": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}


class HQQCheckpoint(Method):
    """``quant_method`` ``hqq``."""

    NAMES: ClassVar[tuple[str, ...]] = ("hqq",)

    def __init__(self, default: Mapping[str, Any]) -> None:
        """Numbers of weights that do not have their own."""
        self.default = default

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`; numbers are checked where they are used."""
        said: Any = quantization.get("quant_config", quantization)
        for key in ("quant_config", "weight_quant_params"):
            said = said.get(key, said) if isinstance(said, Mapping) else said
        if not isinstance(said, Mapping):
            field = "quantization_config.quant_config"
            raise FormatError("not an object", field=field, expected="weight_quant_params", got=said)
        return cls(said)

    def find(self, tensors: TensorFiles) -> Found:
        """Weights with a ``W_q``."""
        return by_suffix(tensors, ".W_q", ROLES)

    def meta(self, stored: Companions) -> HQQ:
        """See :meth:`Method.meta`; the numbers of the weight, some bytes, are read."""
        return self._record(stored, planned=True)

    def record(self, stored: Companions, cut: Cut | None = None) -> HQQ:
        """See :meth:`Method.record`."""
        whole = self._record(stored, planned=False)
        made = whole if cut is None else whole.narrow(*cut)
        for role, name in (("scale", "scales"), ("zero", "zeros")):
            stored.finite(role, made.parts[name])
        return made

    def _record(self, stored: Companions, *, planned: bool) -> HQQ:
        for role in FLAGS:
            if self._number(stored, role, 0):
                problem = "scales that are quantised themselves"
                raise UnsupportedError(problem, file=_file(stored), layer=stored.path, field=role, expected=0, got=1)
        shape = self._shape(stored)
        numel, bits = math.prod(shape), STORED_BITS.get(self._number(stored, "nbits", 4))
        axis, channel_wise = self._number(stored, "axis", 0), self._number(stored, "channel_wise", 1)
        if bits is None or axis not in (0, 1):
            role, allowed = ("axis", "0 or 1") if bits is not None else ("nbits", ", ".join(map(str, STORED_BITS)))
            got = self._number(stored, role, None)
            problem = "unknown setting"
            raise UnsupportedError(
                problem, file=_file(stored), layer=stored.path, field=role, expected=allowed, got=got
            )
        group_size = self._number(stored, "group_size", None)
        if not channel_wise:
            # All rows are packed as those of one group of columns would be, whatever the axis.
            group_size, axis = numel, 0
        elif group_size is None or group_size == -1:
            group_size = shape[axis]
        if type(group_size) is not int or group_size < 1 or numel % group_size:
            raise FormatError(
                "weight is not whole groups",
                file=_file(stored),
                layer=stored.path,
                field="group_size",
                expected=f"a divisor of {numel}",
                got=group_size,
            )
        groups = numel // group_size
        rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
        scales = []
        for role in ("scale", "zero"):
            part = stored.planned(role, FLOATS) if planned else stored.part(role, FLOATS)
            if math.prod(part.shape) != groups:
                raise stored.problem(
                    "wrong shape", role, f"{groups} numbers, one a group", list(part.shape), ShapeError
                )
            scales.append(part.view((1, groups) if axis == 0 else (groups, 1)))
        stored.check("zero", (stored.dtype("scale"),))
        self._check_packing(stored, bits)
        w_q = self._codes(stored, planned_codes((rows, columns), bits), planned=planned)
        record = HQQ.made_of(
            w_q=w_q,
            scales=scales[0],
            zeros=scales[1],
            weight_shape=shape,
            bits=bits,
            group_size=group_size,
            axis=axis,
            round_zeros=bool(self._number(stored, "round_zero", 0)),
            channel_wise=bool(channel_wise),
        )
        try:
            HQQ.validate(record.build())
        except Violation as broken:
            got = broken.got
            raise stored.problem(broken.problem, "W_q", broken.expected, got, ShapeError) from None
        return record

    def _codes(self, stored: Companions, wanted: Part, *, planned: bool) -> Part:
        """The packed codes as bytes, whatever they are viewed as."""
        given = stored.planned("W_q") if planned else stored.part("W_q")
        floats = self._number(stored, "view_as_float", 0)
        stored.check("W_q", FLOATS if floats else ("U8", "I32"))
        if given.nbytes != wanted.nbytes:
            expected = f"{wanted.nbytes} bytes, {list(wanted.shape)}"
            raise stored.problem("codes do not fit weight and groups", "W_q", expected, list(given.shape), ShapeError)
        return Part(wanted.dtype, wanted.shape, given.data)

    @staticmethod
    def _check_packing(stored: Companions, bits: int) -> None:
        """The name of the packing, in letters, if there is one."""
        if "packing" not in stored:
            return
        stored.check("packing", ("U8", "I8"))
        name = stored.tensors.raw(stored.name("packing")).tobytes()
        expected = PACKINGS[bits]
        if name != expected.encode():
            got = name[: 2 * len(expected)].decode("ascii", "backslashreplace")
            raise stored.problem("wrong packing", "packing", expected, got)

    @staticmethod
    def _shape(stored: Companions) -> tuple[int, ...]:
        stored.check("shape", ("I64", "I32"), (2,))
        code = NUMPY[stored.dtype("shape")]
        shape = tuple(int(each) for each in np.frombuffer(stored.tensors.raw(stored.name("shape")), code))
        if min(shape) < 1 or math.prod(shape) > 2**48:
            raise stored.problem("not a shape", "shape", "two numbers from 1 on", list(shape), ShapeError)
        return shape

    def _number(self, stored: Companions, role: str, default: Any) -> Any:
        """A number of the weight, else of the configuration."""
        if role not in stored:
            said = self.default.get(role)
            return default if said is None else said
        stored.check(role, tuple(NUMPY))
        if math.prod(stored.shape(role)) != 1:
            raise stored.problem("wrong shape", role, "one number", list(stored.shape(role)), ShapeError)
        value = np.frombuffer(stored.tensors.raw(stored.name(role)), NUMPY[stored.dtype(role)])[0].item()
        return round(value, 2) if isinstance(value, float) else value


def _file(stored: Companions) -> str:
    return str(stored.tensors.file_of(stored.name("W_q")))
