"""The declared table of architectures, and which of them a ``config.json`` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from uqff.consolidated import VOXTRAL, has_mistrals_layout
from uqff.errors import UnsupportedError
from uqff.models.multimodal import MULTIMODAL
from uqff.models.text import TEXT, Architecture

__all__ = ["ARCHITECTURES", "LANGUAGE_MODEL_PREFIX", "architecture_of"]

LANGUAGE_MODEL_PREFIX: Final = "_mistralrs_use_language_model_prefix"
"""Of a Gemma 3 text model in ``config.json``: its paths are those of the larger model that it was taken from."""

ARCHITECTURES: Final = (*TEXT, *MULTIMODAL)
"""The architectures whose layers are known."""

UNPROVED: Final = {
    "Phi4MMForCausalLM": "Phi-4-MM: mistral.rs 0.9.5 adds adapters to decoder layers, quantises none of them, writes "
    "files without them, and loads no file that has them as layers",
}
"""Architectures that the engine loads and that are not declared, and why."""

_BY_CLASS = {name: architecture for architecture in ARCHITECTURES for name in architecture.classes}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` names.

    Raises:
        UnsupportedError: none, or an unknown one; the known ones are listed, or it is said why it is not one of them.
    """
    if has_mistrals_layout(config):
        return _BY_CLASS[VOXTRAL]
    names = config.get("architectures")
    if names == [VOXTRAL]:
        raise UnsupportedError(
            "the engine loads this architecture in the layout of its authors only",
            field="config.architectures",
            expected="params.json and consolidated.safetensors",
            got=VOXTRAL,
        )
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in _BY_CLASS:
            architecture = _BY_CLASS[name]
            if architecture.title == "Gemma 3 text" and config.get(LANGUAGE_MODEL_PREFIX) is True:
                return replace(architecture, decoder="language_model.model", head="language_model.lm_head")
            return architecture
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in UNPROVED:
            raise UnsupportedError(
                f"the engine loads this architecture, whose layers are not declared here; {UNPROVED[name]}",
                field="config.architectures",
                got=name,
            )
    raise UnsupportedError(
        "unknown architecture",
        field="config.architectures",
        expected=f"one of {', '.join(architecture.title for architecture in ARCHITECTURES)}",
        got=names if names else "none",
    )
