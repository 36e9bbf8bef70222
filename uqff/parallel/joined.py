"""Layers that take the same input, multiplied together: their weights lie one behind the other, and are one weight.

Each layer keeps its own: a view of its rows. Where the rows of a type are no runs of bytes, or the types differ, the
layers are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from uqff.errors import UnsupportedError
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.product import multiply
from uqff.parallel.weight import WeightBuffers, to_spec

if TYPE_CHECKING:
    from uqff.families import QuantizedTensor

__all__ = ["Joined"]

_WHOLE: WeakKeyDictionary[torch.nn.Module, WeightBuffers] = WeakKeyDictionary()
"""The joined weight of each layer that is the first of some."""


class Joined:
    """Some layers of the same input, which are one product if they can be."""

    def __init__(self, layers: Sequence[Any], whole: WeightBuffers | None) -> None:
        """See :meth:`of`."""
        self._layers, self._whole = layers, whole
        self._sizes = [each.weight.shape[0] for each in layers]
        self._biases: dict[torch.dtype, torch.Tensor] = {}
        self._biased = whole is not None and any(each.bias is not None for each in layers)

    @classmethod
    def of(cls, *layers: Any) -> Joined:
        """Put the weights of layers behind each other, unless they are so.

        Args:
            layers: of one number of inputs, on one device.
        """
        whole = _WHOLE.get(layers[0])
        if whole is not None and not _is_of(whole, layers):
            whole = None
        if whole is None and all(_can(each) for each in layers):
            whole = _join(layers)
        if whole is not None:
            _WHOLE[layers[0]] = whole
        return cls(layers, whole)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of each, contiguous for an ``x`` of one row."""
        if self._whole is None:
            return tuple(each(x).contiguous() for each in self._layers)
        y = multiply(x, self._whole, self._layers[0].arithmetic)
        if self._biased:
            y = y + self._bias(x.dtype)
        return torch.split(y, self._sizes, -1)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._biases:
            parts = [each._plain_bias(dtype) for each in self._layers]
            device = self._layers[0].weight.device
            self._biases[dtype] = torch.cat(
                [
                    torch.zeros(size, dtype=dtype, device=device) if part is None else part
                    for part, size in zip(parts, self._sizes, strict=True)
                ]
            )
        return self._biases[dtype]


def _can(layer: Any) -> bool:
    """Whether a layer does nothing but multiply and add a bias."""
    return (
        isinstance(layer, QuantizedLinear)
        and type(layer).forward is QuantizedLinear.forward
        and layer.lora is None
        and layer._stats is None
        and not layer.elsewhere
        and not layer.weight.UNQUANTISED
    )


def _is_of(whole: WeightBuffers, layers: Sequence[Any]) -> bool:
    """Whether the layers are still views of it."""
    start, at = 0, []
    for each in layers:
        rows = each.weight.shape[0]
        if not _can(each) or start + rows > whole.shape[0]:
            return False
        at.append(_addresses(whole.record.narrow(0, start, rows)) == each.weight_buffers.addresses())
        start += rows
    return all(at) and start == whole.shape[0]


def _addresses(weight: QuantizedTensor) -> list[int]:
    return [part.as_bytes().tensor().data_ptr() for part in weight.parts.values()]


@torch.inference_mode(False)
@torch.no_grad()
def _join(layers: Sequence[Any]) -> WeightBuffers | None:
    weights = [each.weight for each in layers]
    rows = [each.shape[0] for each in weights]
    if any(each.alignment(0) != 1 or each.kind != weights[0].kind for each in weights):
        return None
    try:
        plans = [each.resized(sum(rows)) for each in weights]
    except UnsupportedError:  # rows share scales
        return None
    if any(to_spec(each.meta()) != to_spec(plans[0].meta()) for each in plans):
        return None
    parts = {}
    for name, planned in plans[0].parts.items():
        pieces = [each.parts[name].as_bytes().tensor().reshape(-1) for each in weights]
        if any(piece.numel() * sum(rows) != planned.nbytes * n for piece, n in zip(pieces, rows, strict=True)):
            return None  # not so many bytes a row: one scale for all, for one
        parts[name] = torch.cat(pieces).view(planned.dtype.torch).reshape(planned.shape)
    whole, start = plans[0].replaced(**parts), 0
    for layer, n in zip(layers, rows, strict=True):
        view = whole.narrow(0, start, n)
        buffers = layer.weight_buffers._buffers
        for name, part in view.parts.items():
            buffers[name] = part.as_bytes().tensor()
        start += n
    return WeightBuffers(whole)
