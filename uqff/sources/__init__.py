"""Checkpoints that others wrote, opened for reading."""

from uqff.sources.safetensors import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
