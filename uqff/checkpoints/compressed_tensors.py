"""Checkpoints of compressed-tensors, which llm-compressor writes.

::

    pack-quantized        .weight_packed      I32 [out, ⌈in·bits/32⌉]       rows of codes + 2^(bits-1), a bit stream
                          .weight_scale       float [out, groups], [out, 1] or [1]
                          .weight_zero_point  I32 [⌈out·bits/32⌉, groups]   packed by columns, or I8 [out, groups]
                          .weight_shape       integers [2]: out, in
                          .weight_g_idx       I32 [in]; -1 in all: there is none
                          stacks: all with a dimension for experts in front; .weight_shape integers [3]
    int-quantized, naive  .weight             I8 [out, in]; .weight_scale and .weight_zero_point (I8) as above
    float-quantized       .weight             F8_E4M3 [out, in]
                          .weight_scale       float [1], [out, 1], or of blocks or groups
    nvfp4-pack-quantized  .weight_packed      U8 [out, in/2]                two e2m1 codes, the first in the low bits
                          .weight_scale       F8_E4M3 [out, in/16]
                          .weight_global_scale  F32 [1]                     divides the scales
    mxfp4-pack-quantized  .weight_packed      U8 [..., out, in/2], .weight_scale U8 [..., out, in/32]: MXFP4

Integers are exact AFQ records where the groups allow it (:mod:`uqff.checkpoints.grouped`); one scale of FP8 is an exact
FP8 record.  The configuration has groups of modules; that of a weight is the first one whose ``targets`` name its
path, else the first one with a regular expression (``re:``) that matches from its start, else the first one with a
class, such as ``Linear``::

    "config_groups": {"group_0": {"targets": ["Linear"], "format": null,
        "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128}}}

Authority: compressed-tensors 0.20, ``compressors/``, ``quantization/quant_args.py``, ``utils/match.py``,
``quantization/lifecycle/forward_helpers.py`` (``_dequantize``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import FLOATS, Companions, OfExpert, float32_of
from uqff.checkpoints.fp8 import scaled
from uqff.checkpoints.gptq import index_of, words_of
from uqff.checkpoints.grouped import U8, Groups
from uqff.checkpoints.method import Cut, Found, Method, is_ignored, modules_of, regular, setting
from uqff.checkpoints.mxfp4 import block_floats
from uqff.checkpoints.table import TableCodes
from uqff.codes import DType
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.families.mxfp4.reference import E2M1
from uqff.families.part import Part
from uqff.families.stacking import stack
from uqff.numerics.packing import e4m3_to_float32, unpack_row

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["CompressedTensors"]

FORMATS: Final = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
BITS: Final = (2, 3, 4, 6, 8)
STRATEGIES: Final = ("tensor", "channel", "group", "block", "tensor_group")
ENDS: Final = ("scale", "zero_point", "shape", "g_idx", "global_scale")
GROUP_FP4: Final = 16
GROUP_MXFP4: Final = 32
FP4: Final = (("tensor_group", GROUP_FP4), ("group", GROUP_MXFP4))
"""NVFP4, and MXFP4."""


class _Scheme(NamedTuple):
    """How the weights of some modules were quantised."""

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    size: int | None
    block: tuple[int, int] | None


class CompressedTensors(Method):
    """``quant_method`` ``compressed-tensors``."""

    NAMES: ClassVar[tuple[str, ...]] = ("compressed-tensors",)

    def __init__(self, schemes: tuple[tuple[tuple[str, ...], _Scheme], ...], ignored: tuple[str, ...] = ()) -> None:
        self.schemes = schemes
        self.ignored = ignored

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`."""
        setting(quantization, "format", FORMATS, default="dense")
        sparsity = quantization.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            field = "quantization_config.sparsity_config"
            raise UnsupportedError("sparse weights", field=field, expected="format dense", got=sparsity)
        groups = quantization.get("config_groups")
        if not isinstance(groups, Mapping):
            raise FormatError("not an object", field="quantization_config.config_groups", got=groups)
        made = []
        for name, group in groups.items():
            key = f"config_groups.{name}"
            targets = group.get("targets") if isinstance(group, Mapping) else None
            if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
                raise FormatError("not a list of modules", field=f"quantization_config.{key}.targets", got=targets)
            for each in targets:
                if each.startswith("re:"):
                    regular(each, "re:", f"{key}.targets")
            setting({f"{key}.format": group.get("format")}, f"{key}.format", FORMATS, default="dense")
            if group.get("weights") is not None:
                made.append((tuple(targets), _scheme(group["weights"], f"{key}.weights")))
        return cls(tuple(made), modules_of(quantization, "ignore"))

    def find(self, tensors: TensorFiles) -> Found:
        """Packed weights, and weights of one byte a code, or with scales."""
        found: Found = {}
        for name in tensors:
            path, _, end = name.rpartition(".")
            coded = tensors.dtype(name) in ("I8", "F8_E4M3") or f"{path}.weight_scale" in tensors
            if not path or not (end == "weight_packed" or (end == "weight" and coded)):
                continue
            roles = {end: name, "input_scale": f"{path}.input_scale"}
            roles |= {f"weight_{each}": f"{path}.weight_{each}" for each in ENDS}
            found[path] = {role: each for role, each in roles.items() if each in tensors}
        return found

    def leaves_plain(self, path: str) -> bool:
        """See :meth:`Method.leaves_plain`: what is ignored, and what no target names; classes cannot be told."""
        if is_ignored(path, self.ignored):
            return True
        targets = [each for targets, _ in self.schemes for each in targets]
        return not any(each == path or (each.startswith("re:") and re.match(each[3:], path)) for each in targets)

    def _of(self, stored: Companions) -> _Scheme:
        path, targets = stored.path, [(each, scheme) for targets, scheme in self.schemes for each in targets]
        named = [scheme for each, scheme in targets if each == path]
        matched = [scheme for each, scheme in targets if each.startswith("re:") and re.match(each[3:], path)]
        of_class = [scheme for each, scheme in targets if each.isidentifier() and each[0].isupper()]
        for found in (named, matched, of_class):
            if found:
                return found[0]
        role = next(iter(stored.names))
        raise stored.problem("no group of the configuration names the weight", role, "a target in config_groups")

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`; of integers looks at the scales, the shape and the index, too."""
        return self._record(stored, None, planned=True)

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`."""
        return self._record(stored, cut, planned=False)

    def _record(self, stored: Companions, cut: Cut | None, *, planned: bool) -> QuantizedTensor:
        scheme = self._of(stored)
        if scheme.kind == "int":
            if len(stored.shape("weight_packed" if _is_packed(stored) else "weight")) == 3:
                return _stack(stored, scheme, cut, planned=planned)
            groups = _groups(stored, scheme, planned=planned)
            return groups.meta() if planned else groups.record(lambda *ranges: _codes(stored, scheme, *ranges), cut)
        if scheme.size == GROUP_MXFP4 and scheme.bits == 4:
            blocks = stored.planned("weight_packed", ("U8",)) if planned else stored.part("weight_packed", ("U8",))
            *outer, row = blocks.shape or (0,)
            if not outer or 2 * row % GROUP_MXFP4:
                raise stored.problem(
                    "row is not whole blocks", "weight_packed", "[..., a multiple of 16]", row, ShapeError
                )
            of_scales = (*outer, 2 * row // GROUP_MXFP4)
            return block_floats(stored, blocks, "weight_scale", of_scales, planned=planned, cut=cut)
        if scheme.bits == 4:
            return _fp4(stored, scheme, cut, planned=planned)
        stored.check("weight", ("F8_E4M3",))
        block = scheme.block
        if scheme.strategy == "group" and scheme.size is not None:
            block = (1, scheme.size)
        return scaled(stored, "weight_scale", block, planned=planned, cut=cut)


def _scheme(weights: object, key: str) -> _Scheme:
    field = f"quantization_config.{key}"
    if not isinstance(weights, Mapping):
        raise FormatError("not an object", field=field, got=weights)

    def one_of(name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        return setting({f"{key}.{name}": weights.get(name)}, f"{key}.{name}", allowed, default=default)

    kind = one_of("type", ("int", "float"), "int")
    bits = one_of("num_bits", BITS if kind == "int" else (4, 8), 8)
    size, block = weights.get("group_size"), weights.get("block_structure")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise FormatError("not a size of groups", field=f"{field}.group_size", expected="a positive number", got=size)
    size = None if size == -1 else size
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)
    ):
        raise FormatError(
            "not a size of blocks", field=f"{field}.block_structure", expected="[rows, columns]", got=block
        )
    default = "group" if size is not None else "channel" if weights.get("group_size") == -1 else "tensor"
    strategy = one_of("strategy", STRATEGIES, default)
    if size is not None and strategy not in ("group", "tensor_group"):
        raise FormatError("a size of groups", field=f"{field}.group_size", expected=f"none for {strategy}", got=size)
    if strategy in ("group", "tensor_group") and size is None:
        raise FormatError("no size of groups", field=f"{field}.group_size", expected="a positive number", got=None)
    if (strategy == "block") != (block is not None) or (kind == "int" and strategy in ("block", "tensor_group")):
        raise UnsupportedError(
            "unknown setting", field=f"{field}.strategy", expected=f"one that fits {kind}", got=strategy
        )
    if kind == "float" and bits == 4 and (strategy, size) not in FP4:
        expected = "tensor_group of 16, or group of 32"
        raise UnsupportedError("unknown setting", field=f"{field}.strategy", expected=expected, got=strategy)
    fixed = (block[0], block[1]) if block is not None else None
    return _Scheme(bits, kind, one_of("symmetric", (True, False), True), strategy, size, fixed)


def _is_packed(stored: Companions) -> bool:
    return "weight" not in stored


def _stack(stored: Companions, scheme: _Scheme, cut: Cut | None, *, planned: bool) -> QuantizedTensor:
    """The record of a stack: of AFQ, if all of its experts are."""
    count = stored.shape("weight_packed" if _is_packed(stored) else "weight")[0]
    first, last = (cut[1], cut[1] + cut[2]) if cut is not None and cut[0] == 0 else (0, count)
    inner = None if cut is None or cut[0] == 0 else (cut[0] - 1, cut[1], cut[2])
    experts = [OfExpert(stored, at) for at in range(count)]
    groups = [_groups(each, scheme, planned=planned) for each in experts]
    apart = any(each.afq_group is None for each in groups)
    groups = [replace(each, apart=apart) for each in groups]
    if planned:
        return stack([each.meta() for each in groups])
    records = [
        groups[at].record(lambda *ranges, at=at: _codes(experts[at], scheme, *ranges), inner)
        for at in range(first, last)
    ]
    return stack(records)


def _shape(stored: Companions, bits: int) -> tuple[int, int]:
    role = "weight_packed" if _is_packed(stored) else "weight"
    stored.check(role, ("I32",) if _is_packed(stored) else ("I8",))
    if len(stored.shape(role)) != 2:
        raise stored.problem("wrong shape", role, "a matrix", list(stored.shape(role)), ShapeError)
    if not _is_packed(stored):
        return stored.shape(role)[0], stored.shape(role)[1]
    whole = stored.whole if isinstance(stored, OfExpert) else stored
    part = whole.part("weight_shape", ("I64", "I32"), (2 if whole is stored else 3,))
    numbers = part.array().copy().view("<i8" if part.dtype is DType.I64 else "<i4")
    out, columns = (int(each) for each in numbers[-2:])
    if out < 1 or columns < 1:
        raise stored.problem("wrong shape", "weight_shape", "positive numbers", [out, columns], ShapeError)
    stored.check(role, shape=(out, -(-columns * bits // 32)))
    if columns * bits % 8:
        raise stored.problem("rows do not fill bytes", role, f"inputs of {bits} bits", columns, UnsupportedError)
    return out, columns


def _groups(stored: Companions, scheme: _Scheme, *, planned: bool) -> Groups:
    out, columns = _shape(stored, scheme.bits)
    size = columns if scheme.strategy != "group" or scheme.size is None else min(scheme.size, columns)
    count = -(-columns // size)
    scales = stored.finite("weight_scale", stored.part("weight_scale", FLOATS))
    if scheme.strategy == "tensor" and math.prod(scales.shape) == 1:
        scales = Part(scales.dtype, (out, 1), scales.array().tobytes() * out)
    elif scales.shape == (out,) and count == 1:
        scales = scales.view((out, 1))
    elif scales.shape != (out, count):
        raise stored.problem("wrong shape", "weight_scale", [out, count], list(scales.shape), ShapeError)
    index = None
    if "weight_g_idx" in stored:
        stored.check("weight_g_idx", ("I32",), (columns,))
        unused = (stored.part("weight_g_idx").array().copy().view("<i4") == -1).all()
        index = None if unused else index_of(stored, "weight_g_idx", columns, size, count)
    zeros = _zeros(stored, scheme, out, scales.shape[1])
    return Groups((out, columns), scheme.bits, size, scales, None if planned else zeros, index)


def _zeros(stored: Companions, scheme: _Scheme, out: int, count: int) -> U8:
    offset = 1 << (scheme.bits - 1)
    if scheme.symmetric:
        return np.full((out, count), offset, np.uint8)
    role = "weight_zero_point"
    if stored.dtype(role) == "I8":
        part = stored.part(role)
        if math.prod(part.shape) not in (1, out * count):
            raise stored.problem("wrong shape", role, [out, count], list(part.shape), ShapeError)
        zeros = part.array().view(np.int8).astype(np.int16) + offset
        if ((zeros < 0) | (zeros >= 2 * offset)).any():
            raise stored.problem("zero out of range", role, f"{-offset} to {offset - 1}", f"{zeros.min() - offset}")
        return np.ascontiguousarray(np.broadcast_to(zeros.reshape(-1, count), (out, count))).astype(np.uint8)
    stored.check(role, ("I32",), (-(-out * scheme.bits // 32), count))
    rows = np.ascontiguousarray(words_of(stored, role).T).view(np.uint8)
    # whole periods of the stream: three bytes hold eight codes of 3 bits
    whole = rows[:, : rows.shape[1] // scheme.bits * scheme.bits] if scheme.bits in (3, 6) else rows
    made = unpack_row(whole, scheme.bits)
    if made.shape[1] < out:
        made = unpack_row(np.pad(rows, ((0, 0), (0, -rows.shape[1] % scheme.bits))), scheme.bits)
    return np.ascontiguousarray(made[:, :out].T)


def _codes(stored: Companions, scheme: _Scheme, rows: slice, columns: slice) -> U8:
    if _is_packed(stored):
        packed = stored.part("weight_packed").rows()
        return np.ascontiguousarray(packed[rows, columns.start * scheme.bits // 8 : columns.stop * scheme.bits // 8])
    codes: U8 = np.ascontiguousarray(stored.part("weight").rows()[rows, columns]) ^ np.uint8(128)
    return codes


def _fp4(stored: Companions, scheme: _Scheme, cut: Cut | None, *, planned: bool) -> TableCodes:
    stored.check("weight_packed", ("U8",))
    shape = stored.shape("weight_packed")
    if len(shape) != 2 or 2 * shape[1] % GROUP_FP4:
        raise stored.problem("wrong shape", "weight_packed", "a matrix of whole groups", list(shape), ShapeError)
    of_scales = (shape[0], 2 * shape[1] // GROUP_FP4)
    stored.check("weight_scale", ("F8_E4M3",), of_scales)
    stored.check("weight_global_scale", ("F32",))
    if math.prod(stored.shape("weight_global_scale")) != 1:
        raise stored.problem(
            "wrong shape", "weight_global_scale", "one scale", list(stored.shape("weight_global_scale")), ShapeError
        )
    codes = stored.planned("weight_packed") if planned else stored.part("weight_packed")
    small = stored.planned("weight_scale") if planned else stored.part("weight_scale")
    table = Part.of_array(np.array(E2M1, np.float32), DType.F32)
    if planned:
        scales, table = Part.planned(of_scales, DType.F32), Part.planned((16,), DType.F32)
        return TableCodes.made_of(codes=codes, scales=scales, table=table, size=GROUP_FP4, name="nvfp4")
    if cut is not None:
        unit = (1, 1) if cut[0] == 0 else (2, GROUP_FP4)
        codes = codes.narrow(cut[0], cut[1] // unit[0], cut[2] // unit[0])
        small = small.narrow(cut[0], cut[1] // unit[1], cut[2] // unit[1])
    divisor = float32_of(stored.finite("weight_global_scale", stored.part("weight_global_scale"))).reshape(())
    if divisor == 0:
        raise stored.problem("division by zero", "weight_global_scale", "another number", 0)
    wide: npt.NDArray[np.float32] = e4m3_to_float32(stored.finite("weight_scale", small).array()) / divisor
    scales = Part.of_array(wide.reshape(small.shape), DType.F32)
    return TableCodes.made_of(codes=codes, scales=scales, table=table, size=GROUP_FP4, name="nvfp4")
