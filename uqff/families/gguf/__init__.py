"""The GGUF family, ggml's block types: :mod:`~uqff.families.gguf.record` is the room, ``blocks`` has the layouts."""

from uqff.families.gguf.record import GGUF

__all__ = ["GGUF"]
