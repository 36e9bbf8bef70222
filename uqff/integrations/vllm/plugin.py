"""What :func:`uqff.integrations.vllm.register` does."""

from __future__ import annotations

from functools import wraps
from typing import Any, Final

from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader

from uqff.integrations.vllm.config import UqffQuantizationConfig
from uqff.integrations.vllm.loader import UqffModelLoader, layers_digest
from uqff.models.config import QUANT_METHOD

__all__ = ["register"]

AUTO: Final = "auto"
"""The format that vLLM takes if nobody says which."""


def register() -> None:
    """See :func:`uqff.integrations.vllm.register`; does nothing the second time."""
    if getattr(EngineArgs, "knows_uqff", False):
        return
    register_quantization_config(QUANT_METHOD)(UqffQuantizationConfig)
    register_model_loader(QUANT_METHOD)(UqffModelLoader)
    asked: Any = EngineArgs.create_model_config

    @wraps(asked)
    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = asked(self, *args, **kwargs)
        if made.quantization == QUANT_METHOD and self.load_format in (AUTO, QUANT_METHOD):
            self.load_format = QUANT_METHOD  # a method has no say in how a model is loaded
            made.hf_config.uqff_layers = layers_digest(made)  # by which vLLM tells apart what it has compiled
        return made

    EngineArgs.create_model_config = create_model_config
    EngineArgs.knows_uqff = True
