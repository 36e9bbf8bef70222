"""FP8: e4m3 with one scale."""

from uqff.families.fp8.tensor import FP8

__all__ = ["FP8"]
