"""F8Q8 on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored

if TYPE_CHECKING:
    from uqff.families.f8q8.tensor import F8Q8

__all__ = ["stored"]


def stored(weight: F8Q8) -> Stored:
    """The blocks."""
    return Stored("f8q8", "F8q8", (weight.blocks,), along=1)
