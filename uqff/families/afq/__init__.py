"""AFQ: MLX's affine groups."""
