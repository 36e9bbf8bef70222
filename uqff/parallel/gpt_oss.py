"""What gpt-oss does otherwise than the other models: its activation, its router, and the sinks of its attention.

Authority: transformers, ``models/gpt_oss/modeling_gpt_oss.py`` (``GptOssExperts``, ``GptOssTopKRouter``,
``GptOssAttention``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from uqff.parallel.mixture import GatedActivation

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm
    from uqff.parallel.mixture import Mixture

__all__ = ["ClampedSwiGLU", "GptOssBlock", "share_sinks"]

ALPHA: Final = 1.702
LIMIT: Final = 7.0
"""What a configuration means that does not say."""


class ClampedSwiGLU(GatedActivation):
    """``(up + 1) · gate · sigmoid(alpha · gate)`` of clamped gates and ups."""

    def __init__(self, alpha: float = ALPHA, limit: float = LIMIT) -> None:
        """Gates are at most ``limit``; ups between ``-limit`` and it."""
        self.alpha, self.limit = alpha, limit

    @classmethod
    def of(cls, config: Any) -> ClampedSwiGLU:
        """What a configuration of ``transformers`` says."""
        return cls(getattr(config, "swiglu_alpha", ALPHA), getattr(config, "swiglu_limit", LIMIT))

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See the class."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class GptOssBlock(torch.nn.Module):
    """The feed-forward layer: a router with biases, whole on every rank, and experts.

    The probabilities are those of the chosen experts alone.
    """

    def __init__(self, config: Any, experts: Mixture) -> None:
        """A block whose router is still on the meta device."""
        super().__init__()
        self.router = torch.nn.Linear(config.hidden_size, config.num_local_experts, device="meta")
        self.experts = experts
        self.top_k: int = config.num_experts_per_tok

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[..., hidden]`` to the same, and what each chosen expert counts."""
        chosen, indices = self.router(hidden_states).topk(self.top_k, dim=-1)
        weights = chosen.softmax(-1)
        return self.experts(hidden_states, indices, weights), weights


def share_sinks(model: torch.nn.Module, comm: Comm) -> None:
    """Keep of the sinks of attention those of this rank's query heads."""
    for module in model.modules():
        sinks = getattr(module, "sinks", None)
        if isinstance(sinks, torch.nn.Parameter):
            held = sinks.detach().chunk(comm.world_size)[comm.rank]
            module.sinks = torch.nn.Parameter(held.clone(), requires_grad=False)
