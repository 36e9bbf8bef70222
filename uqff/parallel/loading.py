"""Layers and experts of a rank, loaded: of each, the slice that the rank holds and nothing else.

What is decided beforehand needs headers only.  What is left to do is a function without arguments, which a
:data:`Run` does at once, or hands to a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

import torch

from uqff.codec.blob import LATEST
from uqff.errors import ShapeError, UnsupportedError, located
from uqff.parallel.accept import parts_of
from uqff.parallel.comm import Comm
from uqff.parallel.experts import FusedExperts, PackedExperts
from uqff.parallel.gather import ColumnParallelStack, ExpertList, ReplicatedStack, RowParallelStack
from uqff.parallel.immediate import QuantizeOntoGuard
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.partition import Cut, OnMisaligned, part_of
from uqff.parallel.projection import PROJECTIONS, at
from uqff.parallel.shard import Shard

if TYPE_CHECKING:
    from uqff.parallel.layer import QuantizedLayer
    from uqff.parallel.mixture import Activation, Mixture
    from uqff.parallel.unloaded import Unloaded

__all__ = ["Run", "UnloadedExperts", "at_once", "experts", "load", "moved"]

_Layer = TypeVar("_Layer", bound="QuantizedLayer")
_Value = TypeVar("_Value")

ONTO: Final = QuantizeOntoGuard()
"""The guard of all layers that this process loads."""

UnloadedExperts: TypeAlias = "Unloaded | Sequence[Unloaded]"
"""A projection of all experts: one layer ``[experts, out, in]``, or a layer ``[out, in]`` for each."""


class Run(Protocol):
    """What does something now or on a thread."""

    def __call__(self, key: str, work: Callable[[], _Value]) -> Callable[[], _Value]:
        """Begin with it; what is returned waits for the result.

        Args:
            key: of the layer, for errors.
            work: what is done.
        """


def at_once(key: str, work: Callable[[], _Value]) -> Callable[[], _Value]:
    """A :class:`Run` that does it at once."""
    made = work()
    return lambda: made


def load(
    cls: type[_Layer],
    source: Unloaded,
    comm: Comm | None = None,
    *,
    shard: Shard | None = None,
    device: torch.device | str | None = None,
) -> _Layer:
    """The slice of a layer that has not been loaded; nothing else of it is.

    Args:
        cls: what the layer is on the ranks.
        source: the whole.
        comm: the ranks; a world of one if None.
        shard: the slice, if it is not the rank's equal part.
        device: where it goes; it stays a view of the file, where it can be one, if None.

    Raises:
        ShapeError: the weight has other dimensions.
        ShardError: the slice cannot be cut.
        UqffError: the layer is not valid.
    """
    comm, whole, key = Comm.of(comm), source.weight, source.key
    if len(whole.shape) != len(cls.dims):
        expected = f"[{', '.join(cls.dims)}]"
        raise ShapeError("weight has other dimensions", layer=key, expected=expected, got=list(whole.shape))
    cut = Shard.of(shard or cls._shard(comm), layer=key).slice_of(whole, layer=key)
    with located(layer=key):
        part = source.take(cut)
    parts_of(part, layer=key)
    made = cls._holding(part, whole, cut, comm, key=key, version=LATEST)
    return made if device is None else moved(made, device)


def moved(layer: _Layer, device: torch.device | str) -> _Layer:
    """A layer on a device; one at a time, if that is not the CPU."""
    with ONTO.on(device):
        return layer.to(device)


def experts(
    gate: UnloadedExperts,
    up: UnloadedExperts,
    down: UnloadedExperts,
    comm: Comm,
    *,
    act: Activation = torch.nn.functional.silu,
    on_misaligned: OnMisaligned = "error",
    device: torch.device | str | None = None,
    key: str | None = None,
    run: Run = at_once,
) -> Callable[[], Mixture]:
    """The rank's part of experts: fused where all projections are stacks, else packed.

    Args:
        gate: all gates.
        up: likewise.
        down: likewise.
        comm: the ranks.
        act: the activation function.
        on_misaligned: what to do if blocks do not allow equal parts, see :mod:`uqff.parallel.experts`.
        device: where the slices go.
        key: of the experts, for errors.
        run: loads stacks and single layers.

    Returns:
        What puts them together, when they are loaded.

    Raises:
        ShardError: the slices cannot be cut.
        ShapeError: the weights do not fit each other.
        UnsupportedError: single experts have biases.
    """
    wholes = (gate, up, down)
    stacked = [not isinstance(each, Sequence) for each in wholes]
    if any(stacked) != all(stacked):
        raise ShapeError("stacks beside single experts", layer=key, expected="one or the other")
    given = [list(each) if isinstance(each, Sequence) else [each] for each in wholes]
    counts = [len(layers) for layers in given]
    if not counts[0] or len(set(counts)) > 1:
        problem = "projections of different numbers of experts" if any(counts) else "no experts"
        raise ShapeError(problem, layer=key, expected="at least 1", got=", ".join(map(str, counts)))
    dims = [inner + is_stack for (_, inner), is_stack in zip(PROJECTIONS, stacked, strict=True)]
    for (name, _), layers, is_stack in zip(PROJECTIONS, given, stacked, strict=True):
        for expert, layer in enumerate(layers):
            if not is_stack and layer.meta.bias_part is not None:
                raise UnsupportedError("PackedExperts take no bias", layer=at(key, f"{expert}.{name}"))
    cuts = [Cut(layer.weight, dim) for layers, dim in zip(given, dims, strict=True) for layer in layers]
    part = part_of(cuts, comm, on_misaligned, key)
    made: list[list[Callable[[], Any]]] = []
    for (_, inner), layers, dim, is_stack in zip(PROJECTIONS, given, dims, stacked, strict=True):
        cls: Any = _class(inner if part is not None else None, is_stack=is_stack)
        shard = Shard.whole() if part is None else part.along(dim)
        made.append([run(each.key, partial(load, cls, each, comm, shard=shard, device=device)) for each in layers])

    def together() -> Mixture:
        if all(stacked):
            gates, ups, downs = (each[0]() for each in made)
            return FusedExperts(gates, ups, downs, comm, act=act, key=key)
        lists = [
            ExpertList([each() for each in layers], at(key, name))
            for layers, (name, _) in zip(made, PROJECTIONS, strict=True)
        ]
        return PackedExperts(lists[0], lists[1], lists[2], comm, act=act, key=key)

    return together


def _class(inner: int | None, *, is_stack: bool) -> type[QuantizedLayer]:
    """What a projection is on the ranks."""
    if inner is None:
        return ReplicatedStack if is_stack else ReplicatedLayer
    stacks, layers = (ColumnParallelStack, RowParallelStack), (ColumnParallelLayer, RowParallelLayer)
    return stacks[inner] if is_stack else layers[inner]
