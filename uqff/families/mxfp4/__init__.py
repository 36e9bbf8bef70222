"""MXFP4: OCP microscaling, fp4 with a shared exponent."""

from uqff.families.mxfp4.tensor import MXFP4

__all__ = ["MXFP4"]
