"""Checkpoints in the layout of Mistral's authors, which the engine reads of one architecture, Voxtral Realtime.

::

    params.json                  the configuration, which names no architecture
    consolidated.safetensors     the weights, by the authors' names

The same weights lie beside them as transformers has them, in ``config.json`` and ``model.safetensors`` or its shards:
those are what is read of all other architectures.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/pipeline/loaders/multimodal_loaders.rs`` (``AutoMultimodalLoader``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

__all__ = ["CONSOLIDATED_NAME", "PARAMS_NAME", "VOXTRAL", "has_mistrals_layout", "is_read_as_consolidated"]

CONSOLIDATED_NAME: Final = "consolidated.safetensors"
PARAMS_NAME: Final = "params.json"
CONFIG_NAME: Final = "config.json"

VOXTRAL: Final = "VoxtralRealtimeForConditionalGeneration"
"""What the engine loads in this layout only."""


def has_mistrals_layout(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of Voxtral's authors."""
    parts = config.get("multimodal")
    return not config.get("architectures") and isinstance(parts, Mapping) and "whisper_model_args" in parts


def is_read_as_consolidated(names: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> bool:
    """Whether a checkpoint is read in this layout, whatever else lies there.

    Args:
        names: of its files.
        read: gives one of its documents by name.

    Raises:
        UqffError: of ``read``.
    """
    if CONSOLIDATED_NAME not in names or PARAMS_NAME not in names:
        return False
    config = read(CONFIG_NAME) if CONFIG_NAME in names else {}
    asked = not config or config.get("architectures") == [VOXTRAL]
    return asked and has_mistrals_layout(read(PARAMS_NAME))
