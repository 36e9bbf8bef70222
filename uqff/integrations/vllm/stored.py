"""What stands for a layer of a file while vLLM hands out the tensors of a checkpoint.

vLLM calls ``weight_loader(param, tensor, ...)``, and on the way there renames tensors, and takes apart stacks and what
is fused.  A :class:`StoredWeight` can be cut like that, which cuts codes, and has no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from uqff.codec.layer import Layer
from uqff.errors import UnsupportedError
from uqff.families import Unquant
from uqff.parallel.unloaded import Unloaded

__all__ = ["StoredWeight", "unloaded_of"]


class StoredWeight(torch.Tensor):
    """A tensor without numbers, of the shape of a layer.

    Attributes:
        layer: which.
        taken: is called when a place is found for it.
        lifted: whether a first dimension of one was added to it.
        shard_id: which part of a layer of vLLM it is; set by vLLM.
    """

    layer: Unloaded
    taken: Callable[[], object]
    lifted: bool
    shard_id: Any

    @staticmethod
    def of(layer: Unloaded, dtype: torch.dtype, taken: Callable[[], object], *, lifted: bool = False) -> StoredWeight:
        """What stands for a layer.

        Args:
            layer: of a file.
            dtype: that vLLM is told; that of activations.
            taken: see the attribute.
            lifted: likewise.
        """
        shape = (1, *layer.weight.shape) if lifted else layer.weight.shape
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(StoredWeight)
        made.layer, made.taken, made.lifted = layer, taken, lifted
        return made

    def instead(self, layer: Unloaded, *, lifted: bool = False) -> StoredWeight:
        """What stands for a part of the layer, or for all of it in another shape."""
        return StoredWeight.of(layer, self.dtype, self.taken, lifted=lifted)

    def cut(self, dim: int, start: int, length: int) -> StoredWeight:
        """A range of one dimension.

        Raises:
            UnsupportedError: it is one of the stored layer's plus one.
        """
        if self.lifted:
            raise UnsupportedError("a model of vLLM cuts what it has made a stack of", layer=self.layer.key)
        return self.instead(self.layer.narrow(dim, start, length))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Cut codes, or fill a place of plain numbers; what else needs numbers is an error.

        Raises:
            UnsupportedError: a model of vLLM does with its weights what codes do not permit.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _CUTS:
            return _CUTS[name](*args, **kwargs)
        if name in _LOOKS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        first = next((each for each in args if isinstance(each, StoredWeight)), None)
        raise UnsupportedError(
            "a model of vLLM changes a weight that is quantised",
            layer=None if first is None else first.layer.key,
            expected=", ".join(sorted(_CUTS)),
            got=name,
        )


def _narrow(weight: StoredWeight, dim: int, start: int, length: int) -> StoredWeight:
    return weight.cut(dim % weight.dim(), int(start), length)


def _chunk(weight: StoredWeight, chunks: int, dim: int = 0) -> list[StoredWeight]:
    dim %= weight.dim()
    length = -(-weight.shape[dim] // chunks)
    starts = range(0, weight.shape[dim], length)
    return [weight.cut(dim, start, min(length, weight.shape[dim] - start)) for start in starts]


def _unsqueeze(weight: StoredWeight, dim: int) -> StoredWeight:
    if dim != 0 or weight.lifted:
        raise UnsupportedError("a model of vLLM turns a weight that is quantised", layer=weight.layer.key)
    return weight.instead(weight.layer, lifted=True)


def _unbind(weight: StoredWeight, dim: int = 0) -> list[StoredWeight]:
    if weight.lifted:
        return [weight.instead(weight.layer)]
    if dim != 0 or weight.dim() != 3:
        raise UnsupportedError("a model of vLLM takes a weight apart that is no stack", layer=weight.layer.key)
    return [weight.instead(each) for each in weight.layer.unstack()]


def _item(weight: StoredWeight, index: Any) -> StoredWeight:
    """One expert of a stack, or a range of each dimension."""
    if type(index) is int and weight.dim() == 3 and not weight.lifted:
        return weight.instead(weight.layer.unstack()[index])
    made = weight
    for dim, each in enumerate(index if isinstance(index, tuple) else (index,)):
        if not isinstance(each, slice) or each.step not in (None, 1):
            raise UnsupportedError("a model of vLLM picks out of a weight that is quantised", layer=weight.layer.key)
        start, stop, _ = each.indices(weight.shape[dim])
        made = made if stop - start == weight.shape[dim] else made.cut(dim, start, stop - start)
    return made


def _copy(place: torch.Tensor, weight: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Of layers that vLLM does not ask a method of quantisation about, such as some embeddings and routers."""
    layer = unloaded_of(weight, "")
    made = layer.take(layer.whole()).weight.dequantize(place.dtype)
    return place.copy_(made.view(weight.shape))


def _detach(weight: StoredWeight) -> StoredWeight:
    return weight.instead(weight.layer, lifted=weight.lifted)


_CUTS: dict[str, Callable[..., Any]] = {
    "narrow": _narrow,
    "chunk": _chunk,
    "unsqueeze": _unsqueeze,
    "unbind": _unbind,
    "detach": _detach,
    "copy_": _copy,
    "__getitem__": _item,
}

_LOOKS = frozenset(
    {"__get__", "__set__", "dim", "size", "numel", "is_floating_point", "nelement", "__repr__", "__len__"}
)
"""What looks at shape, dtype and the like."""


def unloaded_of(given: torch.Tensor, key: str) -> Unloaded:
    """The layer that a tensor stands for, or a plain tensor as one.

    Args:
        given: what vLLM hands out.
        key: what errors call it, if it is a plain tensor.
    """
    if isinstance(given, StoredWeight):
        given.taken()
        return given.layer
    return Unloaded.of(Layer(Unquant.of(given)), key)
