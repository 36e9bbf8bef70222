"""Checkpoints of GPTQ and AWQ: exact AFQ records where the groups allow it, see :mod:`uqff.checkpoints.grouped`.

::

                GPTQ                             AWQ (GEMM)
    .qweight    I32 [in·bits/32, out]            I32 [in, out/8]
    .qzeros     I32 [groups, out·bits/32]        I32 [groups, out/8]
    .scales     float [groups, out]              float [groups, out]
    .g_idx      I32 [in], optional

    GPTQ: column of qweight, row of qzeros: one little-endian bit stream; 3-bit codes cross words
    AWQ:  the eight codes of a word, lowest bits first, are columns 0 2 4 6 1 3 5 7

GPTQ stores zero - 1 in as many bits, so that 0 is stored as the highest code; ``checkpoint_format`` ``gptq_v2`` stores
the zero itself, as AWQ does.  A group size of -1 is one group of all inputs.  With ``desc_act`` only ``g_idx`` tells
which group an input belongs to.  GPTQModel's ``dynamic`` says otherwise of
modules whose path a regular expression matches from the start: ``"+:EXPR"`` or ``"EXPR"``, the first one counts; those
of ``"-:EXPR"`` are not quantised.

Authority: AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py``; GPTQModel,
``gptqmodel/quantization/config.py`` (``dynamic_get``); AutoAWQ, ``awq/modules/linear/gemm.py``,
``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import FLOATS, Companions
from uqff.checkpoints.grouped import U8, Groups
from uqff.checkpoints.method import Cut, Found, Method, by_suffix, regular, setting
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.numerics.packing import unpack_row

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["AWQ", "BITS", "GPTQ", "group_size_of", "index_of", "nibbles", "words_of"]

BITS: Final = (2, 3, 4, 8)
ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each code of a word of AWQ, from the lowest bits on."""

ROLES: Final = {name: f".{name}" for name in ("qweight", "qzeros", "scales", "g_idx")}


class _Packed(Method):
    """What the two share: names, scales, the index."""

    def find(self, tensors: TensorFiles) -> Found:
        """All that ends in ``.qweight``."""
        return by_suffix(tensors, ".qweight", ROLES)

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`; looks at the scales and the index, too."""
        return self._groups(stored, planned=True).meta()

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`."""
        return self._groups(stored).record(lambda rows, columns: self._codes(stored, rows, columns), cut)

    @abstractmethod
    def _sizes(self, stored: Companions) -> tuple[int, int, int, int]:
        """Outputs, inputs, bits, inputs of a group; qweight is checked."""

    @abstractmethod
    def _zeros(self, stored: Companions, bits: int) -> U8:
        """``[groups, out]``."""

    @abstractmethod
    def _codes(self, stored: Companions, rows: slice, columns: slice) -> U8:
        """Packed codes of outputs and inputs."""

    def _groups(self, stored: Companions, *, planned: bool = False) -> Groups:
        out, columns, bits, size = self._sizes(stored)
        count = -(-columns // size)
        widths = {-(-out * bits // 32)}
        if bits == 3:  # 32 codes may be packed at once
            widths.add(-(-out // 32) * 3)
        stored.check("qzeros", ("I32",))
        if stored.shape("qzeros") not in [(count, each) for each in widths]:
            expected, got = [count, min(widths)], list(stored.shape("qzeros"))
            raise stored.problem("wrong shape", "qzeros", expected, got, ShapeError)
        scales = stored.finite("scales", stored.part("scales", FLOATS, (count, out))).transposed()
        zeros = None if planned else np.ascontiguousarray(self._zeros(stored, bits)[:, :out].T)
        return Groups((out, columns), bits, size, scales, zeros, index_of(stored, "g_idx", columns, size, count))


class GPTQ(_Packed):
    """``quant_method`` ``gptq``: of AutoGPTQ, GPTQModel, optimum, auto-round's export."""

    NAMES: ClassVar[tuple[str, ...]] = ("gptq",)

    def __init__(
        self,
        bits: int,
        group_size: int,
        *,
        v2: bool,
        dynamic: tuple[tuple[re.Pattern[str], int, int], ...] = (),
        by_activity: bool = False,
    ) -> None:
        """Settings.

        Args:
            bits: of a code.
            group_size: inputs of a group; -1: all.
            v2: whether zeros are stored as they are.
            dynamic: bits and group size of modules whose path a pattern matches.
            by_activity: whether groups are of inputs in another order, which the index tells.
        """
        self.bits = bits
        self.group_size = group_size
        self.v2 = v2
        self.dynamic = dynamic
        self.by_activity = by_activity

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`."""
        bits = setting(quantization, "bits", BITS)
        size = group_size_of(quantization.get("group_size"), "group_size")
        form = setting(quantization, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
        setting(quantization, "pack_dtype", ("int32",), default="int32")
        dynamic = quantization.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise FormatError("not an object", field="quantization_config.dynamic", got=dynamic)
        rules = []
        for pattern, other in dynamic.items():
            if pattern.startswith("-:"):
                continue
            compiled = regular(pattern, "+:", f"dynamic.{pattern}")
            if not isinstance(other, Mapping):
                raise FormatError("not an object", field=f"quantization_config.dynamic.{pattern}", got=other)
            of_rule = group_size_of(other.get("group_size", size), f"dynamic.{pattern}.group_size")
            rules.append((compiled, setting(other, "bits", BITS, default=bits), of_rule))
        by_activity = setting(quantization, "desc_act", (True, False), default=False)
        return cls(bits, size, v2=form == "gptq_v2", dynamic=tuple(rules), by_activity=by_activity)

    def _sizes(self, stored: Companions) -> tuple[int, int, int, int]:
        found = (each[1:] for each in self.dynamic if each[0].match(stored.path))
        bits, size = next(found, (self.bits, self.group_size))
        words, out = _matrix(stored)
        columns = self._inputs(stored, words, bits)
        size = columns if size == -1 else min(size, columns)
        if self.by_activity and size < columns:
            stored.name("g_idx")  # there must be one
        return out, columns, bits, size

    @staticmethod
    def _inputs(stored: Companions, words: int, bits: int) -> int:
        """How many there are: of 3 bits 32 may be packed at once, and the last words may hold fewer."""
        full = 32 * words // bits
        inputs = math.prod(stored.shape("g_idx")) if "g_idx" in stored else full
        fits = words == -(-inputs * bits // 32) or (bits == 3 and words == -(-inputs // 32) * 3)
        if inputs != full and fits and inputs * bits % 8 == 0:  # slices are whole bytes
            _check_rest(stored, inputs * bits)
            return inputs
        if bits == 3 and words % 3:
            raise stored.problem("rows do not hold whole codes", "qweight", f"codes of {bits} bits", words, ShapeError)
        return full

    def _zeros(self, stored: Companions, bits: int) -> U8:
        rows = words_of(stored, "qzeros").view(np.uint8)
        zeros = unpack_row(np.pad(rows, ((0, 0), (0, -rows.shape[1] % bits))) if bits == 3 else rows, bits)
        return zeros if self.v2 else (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)

    def _codes(self, stored: Companions, rows: slice, columns: slice) -> U8:
        words = words_of(stored, "qweight")
        bits = self._sizes(stored)[2]
        first, last = columns.start * bits, columns.stop * bits  # in bits; a slice begins with a byte
        taken = np.ascontiguousarray(words[first // 32 : -(-last // 32), rows].T).view(np.uint8)
        return taken[:, first % 32 // 8 :][:, : (last - first) // 8]


class AWQ(_Packed):
    """``quant_method`` ``awq``: of AutoAWQ, ``version`` ``gemm``."""

    NAMES: ClassVar[tuple[str, ...]] = ("awq",)
    BITS: ClassVar[int] = 4

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`."""
        setting(quantization, "w_bit" if "w_bit" in quantization else "bits", (cls.BITS,))
        version = quantization.get("version")
        if version is not None and (not isinstance(version, str) or version.lower() != "gemm"):
            field = "quantization_config.version"
            raise UnsupportedError("unknown setting", field=field, expected="one of gemm", got=version)
        key = "q_group_size" if "q_group_size" in quantization else "group_size"
        return cls(group_size_of(quantization.get(key), key))

    def _sizes(self, stored: Companions) -> tuple[int, int, int, int]:
        columns, words = _matrix(stored)
        size = columns if self.group_size == -1 else self.group_size
        if columns % size:
            raise stored.problem("inputs are not whole groups", "qweight", f"a multiple of {size}", columns, ShapeError)
        return 8 * words, columns, self.BITS, size

    def _zeros(self, stored: Companions, bits: int) -> U8:
        return _in_order(words_of(stored, "qzeros"))

    def _codes(self, stored: Companions, rows: slice, columns: slice) -> U8:
        begin, end = rows.start // 8, -(-rows.stop // 8)
        codes = _in_order(words_of(stored, "qweight")[columns, begin:end])
        return nibbles(codes[:, rows.start - 8 * begin : rows.stop - 8 * begin].T)


def _matrix(stored: Companions) -> tuple[int, int]:
    stored.check("qweight", ("I32",))
    shape = stored.shape("qweight")
    if len(shape) != 2 or 0 in shape:
        raise stored.problem("wrong shape", "qweight", "a matrix", list(shape), ShapeError)
    return shape[0], shape[1]


def _check_rest(stored: Companions, used: int) -> None:
    """Make sure that nothing follows the codes of GPTQ's rows: an index that is too short would leave codes out.

    Args:
        stored: the tensors.
        used: bits of a row.

    Raises:
        FormatError: there are further codes.
    """
    rest = words_of(stored, "qweight")[used // 32 :].copy()
    rest[:1] &= np.uint32((1 << 32) - (1 << used % 32))
    if rest.any():
        expected = f"an input for each code, as far as they are not 0: {stored.name('qweight')} holds more"
        raise stored.problem("index is too short", "g_idx", expected, list(stored.shape("g_idx")))


def _in_order(words: npt.NDArray[np.uint32]) -> U8:
    """The codes of AWQ's words, ``[rows, words]`` to ``[rows, 8·words]``."""
    codes = np.empty((*words.shape, 8), np.uint8)
    for place, column in enumerate(ORDER):
        codes[..., column] = words >> np.uint32(4 * place) & np.uint32(15)
    return codes.reshape(len(words), -1)


def nibbles(codes: U8) -> U8:
    """Codes of 4 bits ``[rows, n]`` packed, the even ones in the low bits: ``[rows, n/2]``."""
    made: U8 = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(made)


def words_of(stored: Companions, role: str) -> npt.NDArray[np.uint32]:
    """The words of a matrix of I32; a view if they are aligned."""
    part = stored.part(role)
    raw = part.array()
    return (raw if raw.ctypes.data % 4 == 0 else raw.copy()).view("<u4").reshape(part.shape)


def index_of(stored: Companions, role: str, columns: int, size: int, count: int) -> npt.NDArray[np.int32] | None:
    """The group of each input, checked; None if there is none, or if it says what is so without it."""
    if role not in stored:
        return None
    stored.check(role, ("I32",), (columns,))
    index = stored.part(role).array().copy().view("<i4")
    bad = np.flatnonzero((index < 0) | (index >= count))
    if bad.size:
        expected, got = f"groups of 0 to {count - 1}", f"{index[bad[0]]} at input {bad[0]}"
        raise stored.problem("group out of range", role, expected, got)
    return None if (index == np.arange(columns) // size).all() else index


def group_size_of(value: object, key: str) -> int:
    """A size of groups: -1, or a positive number.

    Raises:
        FormatError: it is something else.
    """
    if type(value) is not int or (value < 1 and value != -1):
        field = f"quantization_config.{key}"
        raise FormatError("not a size of groups", field=field, expected="-1 or a positive number", got=value)
    return value
