"""The GGUF family, ggml's block types: :mod:`~uqff.families.gguf.tensor` is the room, ``blocks`` has the layouts."""

from uqff.families.gguf.tensor import GGUF

__all__ = ["GGUF"]
