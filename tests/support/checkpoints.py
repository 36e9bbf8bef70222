"""Small checkpoints: tensors and a configuration in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tools.tiny.quantised import save_tensors
from uqff.checkpoints import Checkpoint, open_checkpoint

__all__ = ["checkpoint_of", "write_checkpoint"]


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A directory of one file and a ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def checkpoint_of(folder: Path, tensors: dict[str, torch.Tensor], **quantization: Any) -> Checkpoint:
    """The same, opened; what is said of the quantisation stands in ``quantization_config``."""
    config = {"quantization_config": quantization} if quantization else {}
    return open_checkpoint(write_checkpoint(folder, tensors, **config))
