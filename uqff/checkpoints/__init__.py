"""Checkpoints that others wrote, opened for reading."""

from uqff.sources.gguf import GgufFile, GgufTensor, open_gguf
from uqff.sources.safetensors import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "GgufFile", "GgufTensor", "open_checkpoint", "open_gguf"]
