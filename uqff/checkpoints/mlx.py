"""Checkpoints of MLX: affine groups, which are AFQ, and microscaling floats.

::

    mode      bits            group
    affine    2 3 4 6 8       32 64 128    <path>.weight  U32 [..., in·bits/32]     an exact AFQ record, a view
                                           <path>.scales  float [..., in/group]
                                           <path>.biases  like scales
    affine    5               32 64 128    the same                                 AFQ of 6 bits: the codes packed anew
    mxfp4     4               32           <path>.scales  U8 [..., in/32]           an exact MXFP4 record, a view
    mxfp8     8               32           the same                                 FP8 with several scales

The row of ``weight`` is one little-endian bit stream.  ``<path>.bias`` is the bias of the layer.  The configuration
says under ``quantization``, and again under ``quantization_config``, what holds for all weights, and under their paths
what holds for single ones: an object with other bits, group and mode, or false for a weight that was left as it is::

    "quantization": {"group_size": 64, "bits": 4, "mode": "affine",
                     "lm_head": {"group_size": 64, "bits": 6}, "model.layers.0.mlp.gate": false}

Authority: MLX, ``mlx/ops.cpp`` (``quantize``, ``dequantize``), ``mlx/backend/cpu/quantized.cpp``; mlx-lm, ``utils.py``
(``load_model``); mistral.rs v0.8.0, ``mistralrs-quant/src/afq/mod.rs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from uqff.checkpoints.companions import FLOATS, Companions
from uqff.checkpoints.e8m0 import EXPONENTS, powers
from uqff.checkpoints.method import Cut, Found, Method, setting
from uqff.checkpoints.mxfp4 import block_floats
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.codes import DType
from uqff.errors import FormatError, UnsupportedError
from uqff.families.afq.tensor import AFQ
from uqff.families.base import QuantizedTensor
from uqff.families.part import Part
from uqff.numerics.packing import pack_row, unpack_row

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["MLX"]

GROUPS: Final = (32, 64, 128)
MODES: Final = {"affine": ((2, 3, 4, 5, 6, 8), GROUPS), "mxfp4": ((4,), (32,)), "mxfp8": ((8,), (32,))}
"""Bits and groups of each mode."""

OTHERS: Final = ("desc_act", "zero_point", "sym", "load_in_4bit", "load_in_8bit", "config_groups")
"""What other methods say where they do not name themselves."""


class Setting(NamedTuple):
    """How a weight was quantised."""

    mode: str
    bits: int
    group_size: int


class MLX(Method):
    """Checkpoints of ``mlx_lm.convert -q``; ``quant_method`` is not said, or ``mlx`` or ``afq``."""

    NAMES: ClassVar[tuple[str, ...]] = ("mlx", "afq")

    def __init__(self, default: Setting, of_paths: Mapping[str, Setting | None]) -> None:
        """Settings.

        Args:
            default: of all weights.
            of_paths: of single ones; None for those that were left as they are.
        """
        self.default = default
        self.of_paths = of_paths

    @classmethod
    def means(cls, name: object, quantization: Mapping[str, Any]) -> bool:
        """See :meth:`Method.means`: MLX does not name itself, and says bits and groups."""
        says = name is None and "bits" in quantization and "group_size" in quantization
        return name in cls.NAMES or (says and not any(each in quantization for each in OTHERS))

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`."""
        default = _setting(quantization, "")
        of_paths: dict[str, Setting | None] = {}
        for path, value in quantization.items():
            if value is False:
                of_paths[path] = None
            elif isinstance(value, Mapping):
                of_paths[path] = _setting({"mode": default.mode, **value}, path)
        return cls(default, of_paths)

    def find(self, tensors: TensorFiles) -> Found:
        """Weights in U32."""
        found: Found = {}
        for name in tensors:
            path = name.removesuffix(".weight")
            if path == name or tensors.dtype(name) != "U32" or self.of_paths.get(path, self.default) is None:
                continue
            roles = {"weight": name, "scales": f"{path}.scales", "biases": f"{path}.biases"}
            found[path] = {role: each for role, each in roles.items() if each in tensors}
        return found

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`."""
        return self._record(stored, planned=True)

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`."""
        return self._record(stored, planned=False, cut=cut)

    def _record(self, stored: Companions, *, planned: bool, cut: Cut | None = None) -> QuantizedTensor:
        mode, bits, group_size = self.of_paths.get(stored.path) or self.default
        take = stored.planned if planned else stored.part
        weight = take("weight", ("U32",)).as_bytes()
        *outer, row = weight.shape
        if not outer or row * 8 % (bits * group_size):
            problem = "row is not whole groups"
            raise stored.problem(
                problem, "weight", f"[..., a multiple of {bits * group_size // 32}]", [*outer, row // 4]
            )
        scales_shape = (*outer, row * 8 // bits // group_size)
        if mode == "mxfp4":
            return block_floats(stored, weight, "scales", scales_shape, planned=planned, cut=cut)
        if mode == "mxfp8":
            codes = Part(DType.F8E4M3, weight.shape, weight.data)
            exponents = take("scales", EXPONENTS, scales_shape)
            made = ScaledFP8.made_of(weight=codes, scales=exponents, rows=1, columns=group_size)
            made = made if cut is None else made.narrow(*cut)
            return made.replaced(scales=powers(stored, "scales", made.parts["scales"]))
        scales = take("scales", FLOATS, scales_shape)
        biases = take("biases", (stored.dtype("scales"),), scales_shape)
        afq = AFQ.made_of(
            w_q=weight, scales=scales, biases=biases, bits=8 if bits == 5 else bits, group_size=group_size
        )
        if bits == 5:
            return self._wider(stored, afq, planned=planned, cut=cut)
        return _finite(stored, afq if cut is None else afq.narrow(*cut), planned=planned)

    @staticmethod
    def _wider(stored: Companions, five: AFQ, *, planned: bool, cut: Cut | None) -> AFQ:
        """Codes of 5 bits, which AFQ does not have, in 6: the numbers are the same.

        Args:
            stored: the tensors.
            five: a record of 8 bits that holds them, whose rows are therefore too short by three eighths.
            planned: whether it has no bytes.
            cut: the slice.
        """
        parts, last = five.parts, len(five.shape) - 1
        w_q, scales, biases = parts["w_q"], parts["scales"], parts["biases"]
        if cut is not None:
            dim, start, length = cut
            unit, codes = (five.group_size, five.group_size * 5 // 8) if dim == last else (1, 1)
            w_q = w_q.narrow(dim, start // unit * codes, length // unit * codes)
            scales, biases = (each.narrow(dim, start // unit, length // unit) for each in (scales, biases))
        *outer, row = w_q.shape
        if planned:
            w_q = Part.planned((*outer, row * 6 // 5), DType.U8)
        else:
            rows = w_q.array().reshape(-1, row)
            packed = [pack_row(unpack_row(rows[at : at + 256], 5), 6) for at in range(0, len(rows), 256)]
            w_q = Part.of_array(_joined(packed, (*outer, row * 6 // 5)), DType.U8)
        return _finite(stored, five.replaced(w_q=w_q, scales=scales, biases=biases, bits=6), planned=planned)


def _joined(pieces: list[Any], shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.concatenate(pieces).reshape(shape) if math.prod(shape) else np.empty(shape, np.uint8)


def _finite(stored: Companions, record: AFQ, *, planned: bool) -> AFQ:
    if not planned:
        for role in ("scales", "biases"):
            stored.finite(role, record.parts[role])
    return record


def _setting(said: Mapping[str, Any], path: str) -> Setting:
    """What is said of all weights, or of one."""
    mode = setting(said, "mode", tuple(MODES), default="affine")
    bits, groups = MODES[mode]
    default_bits, default_group = (4, 64) if mode == "affine" else (bits[0], groups[0])
    try:
        return Setting(
            mode,
            setting(said, "bits", bits, default=default_bits),
            setting(said, "group_size", groups, default=default_group),
        )
    except (FormatError, UnsupportedError) as error:
        if path and error.field is not None:
            error.field = error.field.replace("quantization_config", f"quantization_config.{path}", 1)
        raise
