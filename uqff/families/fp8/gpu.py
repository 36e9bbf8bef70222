"""FP8 on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored

if TYPE_CHECKING:
    from uqff.families.fp8.tensor import FP8

__all__ = ["stored"]


def stored(weight: FP8) -> Stored:
    """Codes and the scale, which stays on the GPU."""
    return Stored("fp8", "Fp8", (weight.weight, weight.dequant_w_scale), along=1)
