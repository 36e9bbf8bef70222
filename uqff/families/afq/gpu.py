"""AFQ on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored

if TYPE_CHECKING:
    from uqff.families.afq.tensor import AFQ

__all__ = ["stored"]


def stored(weight: AFQ) -> Stored | None:
    """Codes, scales and biases, if there are as many of these as the codes need."""
    scales, biases = weight.parts["scales"], weight.parts["biases"]
    groups = (*weight.shape[:-1], weight.shape[-1] // weight.group_size)
    if not scales.shape == biases.shape == groups or scales.dtype is not biases.dtype:
        return None
    decoder = f"Afq<{weight.bits}, {weight.group_size}, {scales.dtype.name}>"
    return Stored("afq", decoder, (weight.w_q, weight.scales, weight.biases), along=3)
