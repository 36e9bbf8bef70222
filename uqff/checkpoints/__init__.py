"""Checkpoints that others wrote, opened for reading."""

from uqff.checkpoints.checkpoint import Checkpoint, open_checkpoint
from uqff.checkpoints.safetensors import TensorFiles, open_tensors
from uqff.gguf.reader import GgufFile, GgufTensor, open_gguf

__all__ = [
    "Checkpoint",
    "GgufFile",
    "GgufTensor",
    "TensorFiles",
    "open_checkpoint",
    "open_gguf",
    "open_tensors",
]
