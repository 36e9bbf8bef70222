"""Scales that are exponents: E8M0 of the OCP Microscaling Formats, one byte a scale."""

from __future__ import annotations

from typing import Final

import numpy as np

from uqff.checkpoints.companions import Companions
from uqff.codes import DType
from uqff.families.part import Part

__all__ = ["EXPONENTS", "powers"]

EXPONENTS: Final = ("U8", "F8_E8M0")
"""What they are stored as."""


def powers(stored: Companions, role: str, part: Part) -> Part:
    """Scales as float32: byte s means 2^(s - 127), and 255 no number.

    Args:
        stored: the tensors, for errors.
        role: of the scales.
        part: the scales as they are stored, or a slice of them.

    Raises:
        FormatError: a scale that is no number.
    """
    if part.is_planned:
        return Part.planned(part.shape, DType.F32)
    exponents = part.array()
    if (exponents == 255).any():
        raise stored.problem("scale is not a number", role, "an exponent from 0 to 254", 255)
    # 2^-127, exponent 0, is subnormal in float32.
    made = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
    return Part.of_array(made.reshape(part.shape), DType.F32)
