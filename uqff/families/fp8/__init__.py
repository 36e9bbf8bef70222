"""FP8: e4m3 with one scale."""
