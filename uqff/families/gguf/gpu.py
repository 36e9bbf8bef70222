"""GGUF on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored

if TYPE_CHECKING:
    from uqff.families.gguf.tensor import GGUF

__all__ = ["stored"]


def stored(weight: GGUF) -> Stored | None:
    """The blocks; plain numbers need no kernel."""
    if weight.block_type.block_size == 1:
        return None
    return Stored("gguf", weight.block_type.name, (weight.data,), along=1)
