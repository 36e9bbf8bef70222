"""Unquant: plain numbers."""

from uqff.families.unquant.tensor import Unquant

__all__ = ["Unquant"]
