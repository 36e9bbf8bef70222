"""GGUF on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored

if TYPE_CHECKING:
    from uqff.families.gguf.tensor import GGUF

__all__ = ["stored"]

FOUR_TOGETHER = ("Q2K", "Q3K", "Q6K")
"""Whose ``pieces`` are four."""


def stored(weight: GGUF) -> Stored | None:
    """The blocks; plain numbers need no kernel."""
    if weight.block_type.block_size == 1:
        return None
    name = weight.block_type.name
    return Stored("gguf", name, (weight.data,), along=1, runs=4 if name in FOUR_TOGETHER else 2)
