"""GGUF files to UQFF and back: every block of ggml's types carried over, nothing quantised again."""

from uqff.conversion.direction import convert
from uqff.conversion.from_gguf import uqff_of_gguf
from uqff.conversion.result import Conversion, conversion_document
from uqff.conversion.to_gguf import gguf_of_uqff

__all__ = ["Conversion", "conversion_document", "convert", "gguf_of_uqff", "uqff_of_gguf"]
