"""Checkpoints that others wrote, opened for reading."""

from uqff.checkpoints.safetensors import Checkpoint, open_checkpoint
from uqff.gguf.reader import GgufFile, GgufTensor, open_gguf

__all__ = ["Checkpoint", "GgufFile", "GgufTensor", "open_checkpoint", "open_gguf"]
