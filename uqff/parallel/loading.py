"""Layers of a rank, loaded: of each, the slice that the rank holds and nothing else.

What is decided beforehand needs headers only.  What is left to do is a function without arguments, which a
:class:`Run` does at once, or hands to a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import torch

from uqff.codec.blob import LATEST
from uqff.errors import ShapeError, located
from uqff.parallel.accept import parts_of
from uqff.parallel.comm import Comm
from uqff.parallel.immediate import QuantizeOntoGuard
from uqff.parallel.shard import Shard
from uqff.parallel.upload import upload_to

if TYPE_CHECKING:
    from uqff.parallel.layer import QuantizedLayer
    from uqff.parallel.unloaded import Unloaded

__all__ = ["Run", "at_once", "load", "moved", "when_asked"]

_Layer = TypeVar("_Layer", bound="QuantizedLayer")
_Module = TypeVar("_Module", bound=torch.nn.Module)
_Value = TypeVar("_Value")

ONTO: Final = QuantizeOntoGuard()
"""The guard of all layers that this process loads."""


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


def when_asked(key: str, work: Callable[[], _Value]) -> Callable[[], _Value]:
    """A :class:`Run` that does it when the result is first asked for."""
    return cache(work)


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


def moved(module: _Module, device: torch.device | str) -> _Module:
    """A layer on a device; one at a time, if that is not the CPU, and onto a CUDA device through pinned buffers."""
    place = torch.device(device)
    with ONTO.on(place):
        if place.type != "cuda":
            return module.to(place)
        if place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        made: _Module = module._apply(upload_to(place))  # type: ignore[no-untyped-call]
        return made
