"""Experts of vLLM: the share of a rank of each, stacked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from uqff.errors import FormatError, UnsupportedError
from uqff.integrations.vllm.part import ExpertsPart, make_place
from uqff.integrations.vllm.stored import unloaded_of
from uqff.parallel.shard import Slice
from uqff.parallel.unloaded import Unloaded

__all__ = ["UqffExpertsMethod"]

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
"""Of gates, by the names that vLLM has for them."""

GATE, DOWN, UP = "w1", "w2", "w3"
"""What vLLM calls the projections."""


class UqffExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Holds the codes of the experts of a layer of vLLM, and multiplies with them."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make parameters without numbers, whose ``weight_loader`` takes experts one by one.

        Raises:
            UnsupportedError: experts with biases, without a gate, or of which ranks have some only; or an activation
                that is not known here.
        """
        for told, refused in (
            ("experts with biases", self.moe.has_bias),
            ("experts without a gate", not self.moe.is_act_and_mul),
            ("expert parallelism", layer.use_ep),
            (f"experts with the activation {layer.activation.value}", layer.activation.value not in ACTIVATIONS),
            ("experts with a limit", layer.swiglu_limit is not None),
        ):
            if refused:
                raise UnsupportedError(f"the plug-in for vLLM has no {told}", layer=layer.layer_name)
        layer.uqff_experts = {GATE: {}, DOWN: {}, UP: {}}
        layer.uqff_stacks = torch.nn.ModuleDict()
        for name in ("w13_weight", "w2_weight"):
            make_place(layer, name, params_dtype, _load)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack the shares of all experts.

        Raises:
            FormatError: the files lack an expert.
            ShapeError: they have other shapes than the configuration says.
        """
        inner = self.moe.intermediate_size_per_partition
        parallel = self.moe.moe_parallel_config
        shapes = {GATE: (self.moe.intermediate_size, self.moe.hidden_dim)}
        shapes |= {UP: shapes[GATE], DOWN: shapes[GATE][::-1]}
        for name, experts in layer.uqff_experts.items():
            if len(experts) != layer.local_num_experts:
                expected, got = f"{layer.local_num_experts} experts", len(experts)
                raise FormatError(
                    "model lacks a weight", layer=f"{layer.layer_name} {name}", expected=expected, got=got
                )
            stack = Unloaded.stack([experts[at] for at in range(len(experts))], f"{layer.layer_name}.{name}")
            cut = stack.whole()
            if parallel.tp_size != 1:
                cut = Slice(2 if name == DOWN else 1, parallel.tp_rank * inner, inner)
            layer.uqff_stacks[name] = ExpertsPart(stack, (len(experts), *shapes[name]), cut, layer.w13_weight)
        layer.uqff_experts = {}

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM is used."""

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The share of this rank of what the experts of each token answer, weighted and added up."""
        held, ids = layer.uqff_stacks, topk_ids.long()
        weights = topk_weights.to(x.dtype).unsqueeze(-1)
        given = x.unsqueeze(1)
        if layer.apply_router_weight_on_input:
            given = given * weights
        gate = ACTIVATIONS[layer.activation.value](held[GATE](given, ids))
        y: torch.Tensor = held[DOWN](gate * held[UP](given, ids), ids)
        return y.sum(1) if layer.apply_router_weight_on_input else (y * weights).sum(1)


def _load(
    layer: Any,
    param: torch.Tensor,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """What vLLM calls for each projection of each expert."""
    layer.uqff_experts[shard_id][expert_id] = unloaded_of(loaded_weight, f"{layer.layer_name}.{weight_name}")
    return True if return_success else None
