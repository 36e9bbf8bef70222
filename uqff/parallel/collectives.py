"""Sums and gathers over ranks as operators of torch: they have gradients, and are one node to ``torch.compile``.

::

                   forward                       gradient
    sum_ranks      Σ_r x_r, on every rank        the gradient itself: it is the same on every rank
    copy_ranks     x, the same on every rank     Σ_r g_r: every rank has used x for its part of the outputs
    gather_ranks   x_0, x_1, ... side by side    this rank's part of it

The first two are each other's adjoints, Megatron-LM's *g* and *f*: row-parallel layers end in the one, column-parallel
layers begin with the other.  All ranks must ask for the same gradients, or some wait for others that do not come.

Ranks are called by the name of their group, a text, since operators take nothing else.

Authority: M. Shoeybi et al., *Megatron-LM*, 2019, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from uqff.errors import CommError

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm

__all__ = ["COMMS", "copy_ranks", "gather_ranks", "sum_ranks"]

COMMS: WeakValueDictionary[str, Comm] = WeakValueDictionary()
"""The communicators of this process by the names of their groups."""


def _comm(ranks: str) -> Comm:
    if ranks not in COMMS:
        raise CommError("ranks are not joined", expected="a Comm of that group in this process", got=f"group {ranks!r}")
    return COMMS[ranks]


# torch 2.4 cannot read a schema off annotations that are text, as all are here.
_SCHEMA = "(Tensor x, str ranks) -> Tensor"


@torch.library.custom_op("uqff::sum_ranks", mutates_args=(), schema=_SCHEMA)
def sum_ranks(x: torch.Tensor, ranks: str) -> torch.Tensor:
    """The sum of every rank's ``x``."""
    return _comm(ranks)._sum(x)


@torch.library.custom_op("uqff::copy_ranks", mutates_args=(), schema=_SCHEMA)
def copy_ranks(x: torch.Tensor, ranks: str) -> torch.Tensor:
    """A copy of ``x``: no output of an operator may be its input."""
    return x.clone()


@torch.library.custom_op("uqff::gather_ranks", mutates_args=(), schema=_SCHEMA)
def gather_ranks(x: torch.Tensor, ranks: str) -> torch.Tensor:
    """Every rank's ``x``, along the last dimension, in the order of ranks."""
    return torch.cat(_comm(ranks).all_gather(x.detach()), -1)


@sum_ranks.register_fake
def _(x: torch.Tensor, ranks: str) -> torch.Tensor:
    return x.new_empty(x.shape)


@copy_ranks.register_fake
def _(x: torch.Tensor, ranks: str) -> torch.Tensor:
    return torch.empty_like(x)


@gather_ranks.register_fake
def _(x: torch.Tensor, ranks: str) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * _comm(ranks).world_size)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    ctx.ranks, ctx.width = inputs[1], inputs[0].shape[-1] if inputs[0].ndim else 1


def _of_sum(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return copy_ranks(gradient, ctx.ranks), None


def _of_copy(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return sum_ranks(gradient, ctx.ranks), None


def _of_gather(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient.narrow(-1, _comm(ctx.ranks).rank * ctx.width, ctx.width), None


sum_ranks.register_autograd(_of_sum, setup_context=_keep)
copy_ranks.register_autograd(_of_copy, setup_context=_keep)
gather_ranks.register_autograd(_of_gather, setup_context=_keep)
