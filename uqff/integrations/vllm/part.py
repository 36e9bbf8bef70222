"""The share of a layer that a rank of vLLM holds: codes, and what is to be done if the family cannot cut them there."""

from __future__ import annotations

import torch

from uqff.errors import ShapeError, located
from uqff.families import QuantizedTensor
from uqff.parallel.product import multiply
from uqff.parallel.shard import Slice
from uqff.parallel.unloaded import Unloaded
from uqff.parallel.weight import WeightBuffers

__all__ = ["LinearPart", "buffers_of", "take"]


def take(source: Unloaded, cut: Slice) -> tuple[QuantizedTensor, Slice | None]:
    """The slice of a layer; or all of it, and the slice that remains to be cut, if the family cannot.

    Args:
        source: the layer.
        cut: the slice.
    """
    whole = source.whole()
    with located(layer=source.key):
        if cut.length == source.weight.shape[cut.dim]:
            return source.take(whole).weight, None
        if source.weight.can_narrow(*cut):
            return source.take(cut).weight, None
        return source.take(whole).weight, cut


def buffers_of(weight: QuantizedTensor, like: torch.Tensor) -> WeightBuffers:
    """A weight as a module.

    Args:
        weight: of a slice.
        like: of the device where it goes, and of the dtype of numbers that are not quantised.
    """
    made = WeightBuffers(weight, numbers=weight.UNQUANTISED)
    return made.to(like.device, like.dtype) if made.numbers is not None else made.to(like.device)


class LinearPart(torch.nn.Module):
    """Some outputs, or the product with some inputs, of a layer.

    Attributes:
        codes: of the layer, or of the share alone.
        rest: the slice that is cut when multiplying; None if the codes are those of the slice.
    """

    def __init__(self, source: Unloaded, shape: tuple[int, int], cut: Slice, like: torch.Tensor) -> None:
        """The share of a rank.

        Args:
            source: the whole layer.
            shape: of the whole layer, as vLLM has it.
            cut: the share.
            like: see :func:`buffers_of`.

        Raises:
            ShapeError: the layer has another shape.
        """
        super().__init__()
        if source.weight.shape != shape:
            raise ShapeError(
                "layer does not fit the configuration",
                layer=source.key,
                expected=list(shape),
                got=list(source.weight.shape),
            )
        weight, self.rest = take(source, cut)
        self.codes = buffers_of(weight, like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ`` of the share."""
        if self.rest is None:
            return multiply(x, self.codes)
        dim, start, length = self.rest
        if dim == 0:
            return multiply(x, self.codes).narrow(-1, start, length)
        inputs = self.codes.shape[1]
        return multiply(torch.nn.functional.pad(x, (start, inputs - start - length)), self.codes)
