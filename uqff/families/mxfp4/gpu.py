"""MXFP4 on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored

if TYPE_CHECKING:
    from uqff.families.mxfp4.tensor import MXFP4

__all__ = ["stored"]


def stored(weight: MXFP4) -> Stored:
    """Nibbles and scales."""
    return Stored("mxfp4", "Mxfp4", (weight.blocks, weight.scales), along=2)
