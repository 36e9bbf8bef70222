"""The golden directories of the 0.6.0 client, and what makes their checkpoints again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import uqff
from tools.tiny.models import TinyModel
from uqff.families import AFQ, GGUF
from uqff.quantization.recipe import Recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"

__all__ = ["DIRECTORIES", "GOLDEN", "TinyModel", "differing_blocks", "kinds_of", "recipe_of", "same_weight"]

DIRECTORIES: dict[str, Any] = json.loads((GOLDEN / "MANIFEST.json").read_text())["directories"]

ZERO_SIGNS = {"Q4_1": "m", "Q5_1": "m", "Q4K": "dmin", "Q5K": "dmin"}
"""Fields whose zeros may have either sign: the engine's releases disagree there."""


def kinds_of(directory: str) -> list[str]:
    """The types of a directory."""
    return [file["isq"] for file in DIRECTORIES[directory]["files"].values() if "isq" in file]


def recipe_of(directory: str) -> Recipe | None:
    """The topology that the client was given, None if it was given none."""
    topology = DIRECTORIES[directory]["topology"]
    if topology is None:
        return None
    return parse_recipe("\n".join(f"{selector}:\n  isq: {kind or 'null'}" for selector, kind in topology.items()))


def same_weight(ours: uqff.QuantizedTensor, theirs: uqff.QuantizedTensor) -> bool:
    """Equality by bytes, but for the sign of the zeros that are exempt."""
    if isinstance(ours, AFQ) and isinstance(theirs, AFQ):
        # Compared as numbers -0.0 equals 0.0; there are no NaNs that would not equal themselves.
        scales = zip((ours.scales, ours.biases), (theirs.scales, theirs.biases), strict=True)
        parameters = (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)
        floats = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in scales)
        return parameters and floats and torch.equal(ours.w_q, theirs.w_q)
    if isinstance(ours, GGUF) and isinstance(theirs, GGUF):
        return ours.kind == theirs.kind and ours.shape == theirs.shape and differing_blocks(ours, theirs) == 0
    return ours == theirs


def differing_blocks(ours: GGUF, theirs: GGUF) -> int:
    """How many blocks differ, the sign of exempt zeros aside."""
    return int((_blocks(ours) != _blocks(theirs)).any(axis=1).sum())


def _blocks(weight: GGUF) -> np.ndarray[Any, Any]:
    blocks = np.frombuffer(weight.data.numpy().tobytes(), weight.block_type.numpy).copy()
    if weight.block_type.name in ZERO_SIGNS:
        blocks[ZERO_SIGNS[weight.block_type.name]] += np.float16(0)
    return blocks.view(np.uint8).reshape(-1, weight.block_type.type_size)
