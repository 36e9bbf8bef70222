"""The experts of a mixture: gate, up and down projections of many, of which each token uses a few.

::

    y = Σ_k weight_k · down_e(act(gate_e(x)) · up_e(x)),  e = index_k          the sum over the experts of a token

Every rank holds a part of every expert: of gate and up some outputs, of down the same numbers as inputs.  So each rank
computes a term of ``y``; the terms are added up over the ranks once per block, in float32, after the sum over experts.

Two forms: :class:`FusedExperts` holds each projection as one weight ``[experts, out, in]``, as 1.x files do;
:class:`PackedExperts` a layer per expert, as pre-1.0 files do.  The latter need not be alike: types may differ, and FP8
and HQQ weights that were quantised one by one have no exact stack.

Where a type's blocks do not allow equal parts, ``on_misaligned`` says what is to happen: ``"error"`` (a
:class:`~uqff.errors.ShardError` that names the world sizes that work), ``"uneven"`` (whole blocks, dealt out as evenly
as they can be; an error if there are fewer of them than ranks) or ``"replicate"`` (every rank holds all and nothing is
added up, which is what the engine does from 1.x on).

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/layers.rs`` (``PackedExperts``, ``FusedExperts``) and
``mistralrs-core/src/moe/experts.rs`` (``MoEExperts``).  There a rank of several holds FusedExperts whole, and a fused
``gate_up_proj`` for CUDA is cut through the middle, which gives one rank all gates and the other all ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from uqff.errors import UnsupportedError
from uqff.parallel.comm import Comm
from uqff.parallel.gather import ExpertList, ReplicatedStack
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.mixture import Activation, Mixture, MixtureOptions
from uqff.parallel.projection import (
    PROJECTIONS,
    Experts,
    JoinedWhole,
    SeparateWhole,
    StackedWhole,
    are_single,
    at,
    no_bias,
)
from uqff.parallel.unloaded import Unloaded, UnloadedExperts

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["FusedExperts", "PackedExperts"]


class FusedExperts(Mixture):
    """Experts of which each projection is one stacked weight ``[experts, out, in]``.

    Weights that are given one by one are stacked: exactly, the stored bytes are put together.  Those that cannot be can
    be :class:`PackedExperts`, which do not copy anything either; those of a checkpoint are kept side by side, as a
    weight that UQFF has no form for (:class:`~uqff.checkpoints.separate.SeparateExperts`).

    Attributes:
        gate_proj: this rank's outputs of the gates, ``[experts, inter, hidden]``.
        up_proj: likewise.
        down_proj: the same numbers as inputs, ``[experts, hidden, inter]``.

    Example:
        >>> import torch
        >>> gate, up, down = torch.ones(4, 64, 32), torch.ones(4, 64, 32), torch.ones(4, 32, 64)
        >>> experts = uqff.parallel.FusedExperts.from_layers(gate, up, down, act=torch.relu)
        >>> experts.apply_isq("q8_0").gate_proj.weight.kind
        'q8_0'
        >>> x, weights = torch.ones(1, 32), torch.tensor([[0.25, 0.75]])
        >>> experts(x, torch.tensor([[0, 3]]), weights)[0, :3]
        tensor([65536., 65536., 65536.])
    """

    gate_proj: ReplicatedStack
    up_proj: ReplicatedStack
    down_proj: ReplicatedStack

    @classmethod
    def _form(cls, given: UnloadedExperts, key: str) -> Unloaded:
        return given if isinstance(given, Unloaded) else Unloaded.stack(given, key)

    @classmethod
    def _whole(cls, given: Experts, key: str | None, name: str, inner: int) -> StackedWhole | JoinedWhole:
        if are_single(given):
            return JoinedWhole.of(given, key, name, inner)
        return StackedWhole.of(given, key, name, inner)


class PackedExperts(Mixture):
    """Experts that each have layers of their own, without biases.

    A stack that is given is taken apart, if its experts can be cut out exactly.

    Attributes:
        gate_proj: a layer for each expert, with this rank's outputs, ``[inter, hidden]``.
        up_proj: likewise.
        down_proj: the same numbers as inputs, ``[hidden, inter]``.

    Example:
        >>> import torch
        >>> gates, ups = [torch.ones(64, 32)] * 4, [torch.ones(64, 32)] * 4
        >>> experts = uqff.parallel.PackedExperts.from_layers(gates, ups, [torch.ones(32, 64)] * 4, act=torch.relu)
        >>> experts.gate_proj[3].weight.shape
        (64, 32)
        >>> x, weights = torch.ones(1, 32), torch.tensor([[0.25, 0.75]])
        >>> experts(x, torch.tensor([[0, 3]]), weights)[0, :3]
        tensor([65536., 65536., 65536.])
    """

    gate_proj: ExpertList
    up_proj: ExpertList
    down_proj: ExpertList

    def __init__(
        self,
        gates: ExpertList | Sequence[QuantizedLinear],
        ups: ExpertList | Sequence[QuantizedLinear],
        downs: ExpertList | Sequence[QuantizedLinear],
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        key: str | None = None,
    ) -> None:
        """Experts of layers that are cut already; see the constructors for those that are not.

        Raises:
            UnsupportedError: a layer has a bias.
            ShapeError: the layers do not fit each other.
        """
        lists = []
        for layers, (name, _) in zip((gates, ups, downs), PROJECTIONS, strict=True):
            for expert, layer in enumerate(layers):
                if layer.bias_buffers is not None:
                    raise no_bias(key, expert, name)
            lists.append(layers if isinstance(layers, ExpertList) else ExpertList(layers, at(key, name)))
        super().__init__(lists[0], lists[1], lists[2], comm, act=act, key=key)

    @classmethod
    def _form(cls, given: UnloadedExperts, key: str) -> list[Unloaded]:
        single = given.unstack() if isinstance(given, Unloaded) else list(given)
        for layer in single:
            if layer.meta.bias_part is not None:
                raise UnsupportedError("PackedExperts take no bias", layer=layer.key)
        return single

    @classmethod
    def _whole(cls, given: Experts, key: str | None, name: str, inner: int) -> SeparateWhole:
        return SeparateWhole.of(given, key, name, inner)

    @classmethod
    def from_fused(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        comm: Comm | None = None,
        *,
        bias: bool = False,
        **options: Unpack[MixtureOptions],
    ) -> Self:
        """See :meth:`Mixture.from_fused`.

        Args:
            gate_up: ``[E, hidden, 2·inter]``, or ``[E, 2·inter, hidden]``.
            down: ``[E, inter, hidden]``, or ``[E, hidden, inter]``.
            comm: the ranks; a world of one if None.
            bias: whether the checkpoint has biases, which is refused.
            options: see :class:`~uqff.parallel.mixture.MixtureOptions`.
        """
        if bias:
            raise UnsupportedError("PackedExperts take no bias", layer=options.get("key"))
        return super().from_fused(gate_up, down, comm, **options)
