"""The sum over experts that every mixture ends in, whatever form the experts have.

Authority: mistral.rs v0.8.0, ``mistralrs-core/src/moe/experts.rs`` (``MoEExperts``, ``forward_fast``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from uqff.errors import ShapeError, UnsupportedError
from uqff.parallel.accept import check_activations
from uqff.parallel.comm import Comm
from uqff.parallel.gather import ExpertList, ReplicatedStack, group_by_expert
from uqff.parallel.layer import DistributedKind

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.quantization.types import Engine, Fallback

__all__ = ["Activation", "Mixture"]

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

Projection: TypeAlias = ReplicatedStack | ExpertList


class Mixture(torch.nn.Module):
    """What both forms share: three projections and the sum over experts."""

    def __init__(
        self,
        gate: Projection,
        up: Projection,
        down: Projection,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        key: str | None = None,
    ) -> None:
        """Experts of three projections that are cut already; see the constructors for those that are not.

        Args:
            gate: this rank's outputs of all gates.
            up: likewise.
            down: the same numbers as inputs.
            comm: the ranks; a world of one if None.
            act: the activation function.
            key: of the experts, for errors.

        Raises:
            ShapeError: the projections do not fit each other.
            UnsupportedError: the activation is no function.
        """
        if not callable(act):
            got = repr(act)
            raise UnsupportedError("activation is no function", layer=key, expected="such as torch.relu", got=got)
        super().__init__()
        sizes = [each.size() for each in (gate, up, down)]
        experts, inner, hidden = sizes[0]
        if sizes != [(experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner)]:
            expected = f"gate and up [E, inter, hidden], down [E, hidden, inter], as gate {list(sizes[0])}"
            got = f"up {list(sizes[1])}, down {list(sizes[2])}"
            raise ShapeError("projections do not fit each other", layer=key, expected=expected, got=got)
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self.comm = Comm.of(comm)
        self.act = act
        self.key = key

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.gate_proj.size()[0]

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every expert, not all of it."""
        return self.down_proj._where()[2] is not DistributedKind.REPLICATED

    def forward(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts of each token; see the module for the formula.

        Args:
            x: ``[..., hidden]``, the same on every rank.
            indices: experts of each token, integers ``[..., experts_per_token]``.
            weights: what each counts, ``[..., experts_per_token]``, floating point.

        Returns:
            ``[..., hidden]`` in the dtype of ``x``, the same on every rank. Experts and ranks are added up in float32.

        Raises:
            ShapeError: shapes do not fit, or there is no such expert.
            UnsupportedError: the indices are not integers; activations or weights are no plain numbers.
        """
        check_activations(x, self.gate_proj.size()[2], layer=self.key)
        check_activations(weights, layer=self.key)
        leading = tuple(x.shape[:-1])
        if tuple(indices.shape[:-1]) != leading or weights.shape != indices.shape:
            raise ShapeError(
                "indices and weights do not fit the activations",
                layer=self.key,
                expected=f"both {[*leading, 'experts_per_token']}",
                got=f"{list(indices.shape)} and {list(weights.shape)}",
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, weights = x.reshape(-1, 1, x.shape[-1]), weights.reshape(-1, weights.shape[-1], 1).to(wide)
        counted = weights
        if self.sharded:  # each rank uses both for its part of the sum
            rows, counted = self.comm.sum_gradients(rows), self.comm.sum_gradients(weights)
        groups = group_by_expert(indices.reshape(-1, indices.shape[-1]), self.num_experts, layer=self.key)
        gate, up = (each.add_bias(each.gather_partial(rows, groups), groups) for each in (self.gate_proj, self.up_proj))
        terms: torch.Tensor = self.down_proj.gather_partial(self.act(gate) * up, groups)
        y = (terms.to(wide) * counted).sum(1)
        if self.sharded:
            y = self.comm.sum_all_reduce(y)
        bias = self.down_proj._biases(groups.indices, wide)
        if bias is not None:
            y = y + (bias * weights).sum(1)
        out: torch.Tensor = y.to(x.dtype).view(x.shape)
        return out

    def forward_autocast(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` in the dtype that the gate's family asks for; the result has the dtype of ``x``."""
        check_activations(x, layer=self.key)
        kind = self.gate_proj.quantized_act_type()
        y: torch.Tensor = self.forward(x if kind is None else x.to(kind), indices, weights)
        return y.to(x.dtype)

    def apply_isq(
        self,
        kind: str | int | None,
        device: torch.device | str | None = None,
        *,
        engine: Engine = "0.8",
        engine_biases: bool = False,
        on_fallback: Callable[[Fallback], None] | None = None,
    ) -> Self:
        """New experts with every weight in another type.

        Takes and raises what :meth:`~uqff.parallel.layer.QuantizedLayer.apply_isq` does.
        """
        gate, up, down = (
            each.apply_isq(kind, device, engine=engine, engine_biases=engine_biases, on_fallback=on_fallback)
            for each in (self.gate_proj, self.up_proj, self.down_proj)
        )
        return type(self)(gate, up, down, self.comm, act=self.act, key=self.key)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        held = "a part of each" if self.sharded else "all of each"
        return f"{self.key or ''} {self.num_experts} experts, {held}, {self.comm!r}".strip()
