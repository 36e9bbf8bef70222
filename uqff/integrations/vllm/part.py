"""The share of a layer that a rank of vLLM holds: codes, and what is to be done if the family cannot cut them there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from uqff.errors import located
from uqff.families import QuantizedTensor
from uqff.parallel.product import gather_multiply, multiply
from uqff.parallel.shard import Slice
from uqff.parallel.unloaded import Unloaded
from uqff.parallel.weight import WeightBuffers

__all__ = ["ExpertsPart", "LinearPart", "make_place"]


def make_place(layer: Any, name: str, dtype: torch.dtype, load: Callable[..., Any]) -> None:
    """Give a layer of vLLM a parameter without numbers, whose ``weight_loader`` takes what files hold.

    Args:
        layer: of vLLM.
        name: of the parameter.
        dtype: of activations.
        load: ``(layer, parameter, weight, ...)``: takes a weight.
    """
    weight = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    weight.weight_loader = partial(load, layer)  # type: ignore[attr-defined]
    layer.register_parameter(name, weight)


def _take(source: Unloaded, cut: Slice) -> tuple[QuantizedTensor, Slice | None]:
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


def _buffers_of(weight: QuantizedTensor, like: torch.Tensor) -> WeightBuffers:
    """A weight as a module.

    Args:
        weight: of a slice.
        like: of the device where it goes, and of the dtype of numbers that are not quantised.
    """
    made = WeightBuffers(weight, numbers=weight.UNQUANTISED)
    return made.to(like.device, like.dtype) if made.numbers is not None else made.to(like.device)


class _RankPart(torch.nn.Module):
    """Some outputs of a layer, or its product with some inputs.

    Attributes:
        codes: of the layer, or of the share alone.
        rest: the slice that is cut when multiplying; None if the codes are those of the share.
    """

    def __init__(self, source: Unloaded, shape: tuple[int, ...], cut: Slice, like: torch.Tensor) -> None:
        """The share of a rank.

        Args:
            source: the whole layer.
            shape: of the whole layer, as vLLM has it.
            cut: the share.
            like: of the device where it goes, and of the dtype of numbers that are not quantised.

        Raises:
            ShapeError: the layer has another shape.
        """
        super().__init__()
        weight, self.rest = _take(source.fit(shape), cut)
        self.codes = _buffers_of(weight, like)

    def _inputs(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs of this rank among those of all, which are zeros, if the codes are those of all."""
        if self.rest is None or self.rest.dim != len(self.codes.shape) - 1:
            return x
        _, start, length = self.rest
        return torch.nn.functional.pad(x, (start, self.codes.shape[-1] - start - length))

    def _outputs(self, y: torch.Tensor) -> torch.Tensor:
        """The outputs of this rank."""
        if self.rest is None or self.rest.dim != len(self.codes.shape) - 2:
            return y
        return y.narrow(-1, self.rest.start, self.rest.length)


class LinearPart(_RankPart):
    """A share of a layer ``[out, in]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ`` of the share."""
        return self._outputs(multiply(self._inputs(x), self.codes))


class ExpertsPart(_RankPart):
    """A share of a stack ``[experts, out, in]``."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The product of each token with the shares of its experts: :func:`~uqff.parallel.product.gather_multiply`."""
        return self._outputs(gather_multiply(self._inputs(x), ids, self.codes))
