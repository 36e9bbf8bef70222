"""Gate and up projections in one layer whose outputs take turns, as those of gpt-oss do: gate, up, gate, up.

Authority: transformers, ``models/gpt_oss/modeling_gpt_oss.py`` (``GptOssExperts``); mistral.rs v0.8.0,
``mistralrs-quant/src/mxfp4/mod.rs`` (``packed_gptoss_linear``).
"""

from __future__ import annotations

import math

import numpy as np

from uqff.codec.layer import Layer
from uqff.errors import ShapeError, UnsupportedError
from uqff.families.part import Part

__all__ = ["split_gate_up"]


def split_gate_up(layer: Layer) -> tuple[Layer, Layer]:
    """Gate and up of a layer whose outputs take turns, exactly; copies.

    Args:
        layer: ``[..., 2 · inner, hidden]``, with a bias ``[..., 2 · inner]`` or none; which may lack its bytes.

    Raises:
        ShapeError: the number of outputs is odd.
        UnsupportedError: the rows of the type do not stand by themselves.
    """
    weight, bias = layer.weight, layer.bias_part
    *outer, outputs, _ = weight.shape
    if outputs % 2:
        raise ShapeError("outputs do not take turns", expected="an even number", got=outputs)
    if not weight.has_whole_rows:
        raise UnsupportedError(
            "outputs that take turns", expected="a type whose rows are whole blocks or groups", got=weight.kind
        )
    rows, dim = (*outer, outputs), len(outer)
    ordered = weight.replaced(**{name: _apart(part, rows) for name, part in weight.parts.items() if part.shape})
    inner = outputs // 2
    whole = Layer(ordered, None if bias is None else _apart(bias, rows))
    gate, up = (whole.narrow(dim, start, inner) for start in (0, inner))
    return gate, up


def _apart(part: Part, rows: tuple[int, ...]) -> Part:
    """A part of whole rows with those of even numbers before those of odd ones, in each matrix."""
    if part.is_planned:
        return part
    taken = part.array().reshape(math.prod(rows[:-1]), rows[-1] // 2, 2, -1)
    return Part(part.dtype, part.shape, np.ascontiguousarray(taken.swapaxes(1, 2)).reshape(-1).data)
