"""Small checkpoints: tensors and a configuration in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tools.tiny.quantised import save_tensors
from uqff.checkpoints import Checkpoint, open_checkpoint

__all__ = ["check_record", "checkpoint_of", "same_bits", "write_checkpoint"]


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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of numbers that tells zeros of two signs apart."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_record(checkpoint: Checkpoint, path: str, plain: torch.Tensor) -> Any:
    """A weight has these numbers; what headers say of it is true; its slices are read, cut and joined exactly.

    Returns:
        The record.
    """
    record: Any = checkpoint.layer(path).weight
    assert same_bits(record.dequantize(plain.dtype), plain)
    meta: Any = checkpoint.meta(path).weight
    assert {name: (p.dtype, p.shape) for name, p in meta.parts.items()} == (
        {name: (p.dtype, p.shape) for name, p in record.parts.items()}
    )
    for dim in (0, 1):
        half = record.shape[dim] // 2 // record.alignment(dim) * record.alignment(dim)
        cuts = [(0, half), (half, record.shape[dim] - half)]
        parts = [(start, record.narrow(dim, start, length)) for start, length in cuts if length]
        for start, part in parts:
            length = part.shape[dim]
            assert same_bits(part.dequantize(plain.dtype), plain.narrow(dim, start, length))
            assert checkpoint.paths[path].record(checkpoint.companions(path), (dim, start, length)) == part
        assert record.join(parts, dim) == record
    return record
