"""Checkpoints in FP8: one scale for each tensor, for each row, or for each block of a matrix.

::

    <path>.weight              F8_E4M3 [out, in]
    <path>.weight_scale_inv    float [⌈out/rows⌉, ⌈in/columns⌉]    of ``weight_block_size`` [rows, columns]
    <path>.weight_scale, or    float [], [1] or [1, 1]             one scale: an exact FP8 record
      .weight_scale_inv        float [out] or [out, 1]             one a row
    <path>.input_scale, or     float [] or [1]                     of activations; optional
      .activation_scale

Of stacked experts, ``<name>`` [experts, out, in] and ``<name>_scale_inv`` or ``<name>.weight_scale_inv``
[experts, ...], or with ``.weight`` as above.
Whatever its name says, a scale multiplies the codes.  It is F32, F16 or BF16; or an exponent, F8_E8M0 or U8.

A weight in F8_E4M3 without a scale is refused: its numbers are not known.  So is a scale beside a weight of another
dtype: whether it multiplies the numbers is not known.

Authority: transformers, ``quantizers/quantizer_finegrained_fp8.py``, ``integrations/finegrained_fp8.py``; mistral.rs
v0.8.0, ``mistralrs-quant/src/blockwise_fp8/mod.rs``, ``mistralrs-quant/src/pertensor_fp8/mod.rs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from uqff.checkpoints.companions import FLOATS, Companions, float32_of
from uqff.checkpoints.e8m0 import EXPONENTS, powers
from uqff.checkpoints.method import Cut, Found, Method, is_ignored, modules_of, setting
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.codes import DType
from uqff.errors import FormatError, ShapeError
from uqff.families.base import QuantizedTensor
from uqff.families.fp8.tensor import FP8
from uqff.families.part import Part

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["FP8Checkpoint", "scaled"]

E4M3: Final = "F8_E4M3"
SCALES: Final = ("weight_scale_inv", "weight_scale")
INPUTS: Final = ("input_scale", "activation_scale", "input_activation_scale")
SCALE_DTYPES: Final = (*FLOATS, *EXPONENTS)


class FP8Checkpoint(Method):
    """``quant_method`` ``fp8``: of transformers, DeepSeek, Qwen, vLLM."""

    NAMES: ClassVar[tuple[str, ...]] = ("fp8",)

    def __init__(self, block: tuple[int, int] | None = None, ignored: tuple[str, ...] = ()) -> None:
        self.block = block
        self.ignored = ignored

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`."""
        setting(quantization, "fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
        block = quantization.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)
        ):
            field = "quantization_config.weight_block_size"
            raise FormatError("not a size of blocks", field=field, expected="[rows, columns]", got=block)
        ignored = modules_of(quantization, "modules_to_not_convert") + modules_of(quantization, "ignored_layers")
        return cls(None if block is None else (block[0], block[1]), ignored)

    def find(self, tensors: TensorFiles) -> Found:
        """Tensors of F8_E4M3, or with scales, and what lies beside them."""
        found: Found = {}
        for name in tensors:
            is_weight = name.endswith(".weight")
            path = name.removesuffix(".weight")
            if tensors.shape(name) and not is_ignored(path, self.ignored):
                ends = {role: f"{path}.{role}" if is_weight else f"{name}_{role[7:]}" for role in SCALES}
                if not is_weight and not any(end in tensors for end in ends.values()):
                    ends = {role: f"{name}.{role}" for role in SCALES}
                if tensors.dtype(name) != E4M3 and not any(end in tensors for end in ends.values()):
                    continue
                ends |= {role: f"{path}.{role}" if is_weight else f"{name}_{role}" for role in INPUTS}
                found[path] = {"weight": name, **{role: end for role, end in ends.items() if end in tensors}}
        return found

    def leaves_plain(self, path: str) -> bool:
        """See :meth:`Method.leaves_plain`: what the configuration leaves out."""
        return is_ignored(path, self.ignored)

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`."""
        return scaled(stored, self._scale(stored), self.block, planned=True)

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`."""
        return scaled(stored, self._scale(stored), self.block, cut=cut)

    @staticmethod
    def _scale(stored: Companions) -> str:
        return next((role for role in SCALES if role in stored), SCALES[0])


def scaled(
    stored: Companions, role: str, block: tuple[int, int] | None, *, planned: bool = False, cut: Cut | None = None
) -> FP8 | ScaledFP8:
    """The record of codes in F8_E4M3, role ``weight``, and of their scales.

    Args:
        stored: the tensors.
        role: of the scales.
        block: rows and columns of a block; None if a scale belongs to a tensor or to a row.
        planned: whether the record has no bytes.
        cut: the slice; None for the whole.

    Raises:
        UqffError: there are no scales, or not as many; or one is not finite.
    """
    stored.check("weight", (E4M3,))
    stored.check(role, SCALE_DTYPES)
    weight = stored.planned("weight") if planned else stored.part("weight")
    *outer, out, columns = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    shape, single = stored.shape(role), (1,) * (len(outer) + 2)
    if math.prod(shape) == 1:
        wanted = single
    elif block is None and shape in ((*outer, out), (*outer, out, 1)):
        block, wanted = (1, columns), (*outer, out, 1)
    elif block is None and outer and shape in ((*outer,), (*outer, 1), (*outer, 1, 1)):
        block, wanted = (out, columns), (*outer, 1, 1)
    elif block is None:
        expected = f"[], [1], {[*outer, out, 1]}, or a weight_block_size in quantization_config"
        raise stored.problem("scales do not fit the weight", role, expected, list(shape), ShapeError)
    else:
        wanted = (*outer, -(-out // block[0]), -(-columns // block[1]))
        stored.check(role, shape=wanted)
    if math.prod(wanted) == 1:
        weight = weight if cut is None else weight.narrow(*cut)
        return _one_scale(stored, weight, role, planned=planned)
    assert block is not None
    scales = (stored.planned(role) if planned else stored.part(role)).view(wanted)
    made = ScaledFP8.made_of(weight=weight, scales=scales, rows=block[0], columns=block[1])
    made = made if cut is None else made.narrow(*cut)
    return made.replaced(scales=_numbers(stored, role, made.parts["scales"]))


def _numbers(stored: Companions, role: str, scales: Part) -> Part:
    """Scales that are finite; exponents as float32."""
    if stored.dtype(role) not in FLOATS:
        return powers(stored, role, scales)
    return scales if scales.is_planned else stored.finite(role, scales)


def _one_scale(stored: Companions, weight: Part, role: str, *, planned: bool) -> FP8:
    inputs = next((each for each in INPUTS if each in stored), None)
    if inputs is not None:
        stored.check(inputs, SCALE_DTYPES)
        if math.prod(stored.shape(inputs)) != 1:
            raise stored.problem("wrong shape", inputs, "one scale", list(stored.shape(inputs)), ShapeError)
    if planned:
        scale = inverse = activations = Part.planned((), DType.F32)
    else:
        number = float32_of(_numbers(stored, role, stored.part(role))).reshape(())
        scale = Part.of_array(number, DType.F32)
        with np.errstate(divide="ignore", over="ignore"):
            reciprocal = np.asarray(np.float32(1) / number, np.float32)
        # Of a scale of 0, or nearly, there is none that is finite.
        inverse = Part.of_array(np.where(np.isfinite(reciprocal), reciprocal, np.float32(0)), DType.F32)
        activations = scale
        if inputs is not None:
            activations = Part.of_array(
                float32_of(_numbers(stored, inputs, stored.part(inputs))).reshape(()), DType.F32
            )
    return FP8.made_of(weight=weight, dequant_w_scale=scale, dequant_x_scale=activations, quant_scale=inverse)
