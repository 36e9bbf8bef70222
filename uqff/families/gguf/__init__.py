"""The GGUF family: ggml's block types. See :mod:`uqff.families.gguf.record` for the blob, ``blocks`` for the layouts."""

from uqff.families.gguf.record import GGUF

__all__ = ["GGUF"]
