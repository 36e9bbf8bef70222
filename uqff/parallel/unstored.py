"""Numbers that models of ``transformers`` keep as buffers and no file stores: their configuration gives them.

Authority: transformers 4.53 and 5.23, ``models/gemma3n/modeling_gemma3n.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch

__all__ = ["constants_of"]

BUFFERS: Final[dict[str, dict[str, Callable[[Any], float]]]] = {
    "Gemma3nTextModel": {
        "per_layer_projection_scale": lambda config: float(config.hidden_size**-0.5),
        "per_layer_input_scale": lambda config: 1 / math.sqrt(2.0),
    },
    "Gemma3nTextAltUp": {"router_input_scale": lambda config: float(config.hidden_size**-1.0)},
}
"""By the names of modules and buffers, of a module's configuration."""


def constants_of(module: torch.nn.Module) -> dict[str, float]:
    """The numbers of a module, by the names of its buffers; none of most modules."""
    own = dict(module.named_buffers(recurse=False))
    made = {
        name: formula(module.config) for name, formula in BUFFERS.get(type(module).__name__, {}).items() if name in own
    }
    scale = getattr(module, "scalar_embed_scale", None)
    return made if scale is None or "embed_scale" not in own else {**made, "embed_scale": float(scale)}
