"""HQQ: half-quadratic quantisation."""

from uqff.families.hqq.tensor import HQQ

__all__ = ["HQQ"]
