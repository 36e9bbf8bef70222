"""Architectures of GGUF whose text is converted only beside the part that sees: the engine knows no text model of them.

Authority: llama.cpp, ``conversion/llama.py`` (``Llama4Model``), ``src/models/llama4.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from uqff.checkpoints.gguf.declared import GgufArchitecture
from uqff.checkpoints.gguf.recurrent import QWEN35_MOE

__all__ = ["SEEING"]


def _llama4(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What llama.cpp takes for granted of Llama 4: every fourth layer sees all of a text, and has no rotary embedding;
    of Maverick, which has 128 experts, queries and keys have no norm. How queries are scaled by their places is what
    transformers and the engine take where a configuration does not say it, each in a form of its own.
    """
    return {
        "attention_chunk_size": 8192,
        "no_rope_layers": [int((block + 1) % 4 != 0) for block in range(config["num_hidden_layers"])],
        "use_qk_norm": config["num_local_experts"] != 128,
    }


LLAMA4: Final = GgufArchitecture(
    "llama4",
    ("Llama4ForConditionalGeneration",),
    expert_count="num_local_experts",
    expert_size="moe_intermediate_size",
    fixed={"model_type": "llama4_text"},
    implied=_llama4,
    counts={"interleave_moe_layer_step": "interleave_moe_layer_step"},
    renamed={
        "feed_forward.router": "ffn_gate_inp",
        **{f"feed_forward.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
        **{f"feed_forward.shared_expert.{each}_proj": f"ffn_{each}_shexp" for each in ("gate", "up", "down")},
    },
    scalings=("llama3",),
)
"""Its sizes of experts and of dense layers are called otherwise in ``text_config``, see
:attr:`uqff.checkpoints.gguf.tower_configs.TowerConfig.sizes`.
"""

SEEING: Final = {each.name: each for each in (LLAMA4, QWEN35_MOE)}
"""By ``general.architecture``."""
