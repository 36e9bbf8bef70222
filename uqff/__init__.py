"""UQFF, the Universal Quantized File Format of mistral.rs."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from uqff.codec.blob import Layer, deserialize, serialize
from uqff.codes import DType, Family, Version
from uqff.container import UqffFile, save
from uqff.container import open_uqff as open
from uqff.errors import CommError, FormatError, ShapeError, ShardError, UnsupportedError, UqffError
from uqff.families.base import QuantizedTensor
from uqff.quantization.types import Fallback, FallbackWarning, quantize

if _TYPE_CHECKING:
    from uqff import parallel

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
    "parallel",
    "quantize",
    "save",
    "serialize",
]


def __getattr__(name: str) -> object:
    """``uqff.parallel`` is imported when it is first used."""
    if name != "parallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _import_module("uqff.parallel")


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return sorted({*globals(), *__all__})
