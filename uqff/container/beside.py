"""The names of the files of a model directory, and which of them are a model's own."""

from __future__ import annotations

import re
from typing import Final, Literal

from uqff.container.file import RESIDUAL_NAME
from uqff.container.report import REPORT_NAME
from uqff.container.shards import SUFFIX

__all__ = [
    "COMPANIONS",
    "CONFIG_NAME",
    "INDEX_NAME",
    "KEPT_SUFFIX",
    "LAYER_SUMS_NAME",
    "SUMS_NAME",
    "What",
    "not_of",
]

What = Literal["UQFF model", "checkpoint"]

CONFIG_NAME: Final = "config.json"

COMPANIONS: Final = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "metadata.gguf",
)
"""Files that are copied beside the model if they are there."""

SUMS_NAME: Final = "SHA256SUMS"
"""The list of a directory's files."""
LAYER_SUMS_NAME: Final = "SHA256SUMS.layers"
"""The list of a model's layers."""

KEPT_SUFFIX: Final = ".kept.safetensors"
"""Of layers that have no place in the version of a model."""

INDEX_NAME: Final = "model.safetensors.index.json"
"""Which file of a checkpoint holds which tensor."""

OWN: Final = {
    "UQFF model": (REPORT_NAME, RESIDUAL_NAME),
    "checkpoint": (INDEX_NAME,),
}
"""Names of files that only one of them has."""

ENDINGS: Final = {"UQFF model": (SUFFIX, KEPT_SUFFIX), "checkpoint": (".safetensors",)}

TEMPORARY: Final = re.compile(r"\..*\.(?:[0-9a-f]{16}\.tmp|tmp-[0-9a-f]{16})", re.DOTALL)
"""What a killed process leaves of a file that it was about to replace."""


def not_of(what: What, names: list[str]) -> list[str]:
    """Files of a directory that are not of the model in it, as this package writes one: whoever replaces it loses them.

    Args:
        what: what the directory holds.
        names: of its files.
    """
    own = {*COMPANIONS, SUMS_NAME, LAYER_SUMS_NAME, *OWN[what]}
    return sorted(n for n in names if n not in own and not n.endswith(ENDINGS[what]) and not TEMPORARY.fullmatch(n))
