"""The seven families, by the type byte of a blob."""

from uqff.codes import Family
from uqff.families.afq.tensor import AFQ
from uqff.families.base import QuantizedTensor
from uqff.families.f8q8.tensor import F8Q8
from uqff.families.fp8.tensor import FP8
from uqff.families.gguf import GGUF
from uqff.families.hqq.tensor import HQQ
from uqff.families.mxfp4.tensor import MXFP4
from uqff.families.stacking import stack
from uqff.families.unquant.tensor import Unquant

__all__ = ["AFQ", "F8Q8", "FAMILIES", "FP8", "GGUF", "HQQ", "MXFP4", "QuantizedTensor", "Unquant", "family_of", "stack"]

FAMILIES: tuple[type[QuantizedTensor], ...] = (GGUF, Unquant, HQQ, FP8, AFQ, F8Q8, MXFP4)
"""The record of each family, at the index of its type byte."""


def family_of(family: Family) -> type[QuantizedTensor]:
    """The record of a family."""
    return FAMILIES[family]
