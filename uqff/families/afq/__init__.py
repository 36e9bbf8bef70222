"""AFQ: MLX's affine groups."""

from uqff.families.afq.tensor import AFQ

__all__ = ["AFQ"]
