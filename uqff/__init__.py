"""UQFF, the Universal Quantized File Format of mistral.rs."""

from uqff.blob import Layer, deserialize, serialize
from uqff.codes import DType, Family, Version
from uqff.container import UqffFile, save
from uqff.container import open_uqff as open
from uqff.errors import CommError, FormatError, ShapeError, ShardError, UnsupportedError, UqffError
from uqff.families.base import QuantizedTensor
from uqff.isq import Fallback, FallbackWarning, quantize

__version__ = "0.1.0"

__all__ = [
    "CommError",
    "DType",
    "Fallback",
    "FallbackWarning",
    "Family",
    "FormatError",
    "Layer",
    "QuantizedTensor",
    "ShapeError",
    "ShardError",
    "UnsupportedError",
    "UqffError",
    "UqffFile",
    "Version",
    "deserialize",
    "open",
    "quantize",
    "save",
    "serialize",
]
