"""UQFF as a method of quantisation of vLLM: which of its layers hold codes."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from uqff.integrations.vllm.experts import UqffExpertsMethod
from uqff.integrations.vllm.linear import UqffLinearMethod
from uqff.integrations.vllm.vocabulary import UqffEmbeddingMethod
from uqff.models.config import QUANT_METHOD

__all__ = ["UqffQuantizationConfig"]


class UqffQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """How vLLM is told of UQFF."""

    def get_name(self) -> str:
        """``uqff``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that layers multiply."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPUs that there are kernels for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: what there is stands in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> UqffQuantizationConfig:
        """Of ``quantization_config``, of which the loader reads which files are meant."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What holds the weights of a layer; None of one that has none."""
        if isinstance(layer, LinearBase):
            return UqffLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return UqffEmbeddingMethod()
        if isinstance(layer, RoutedExperts):
            return UqffExpertsMethod(layer.moe_config)
        return None
