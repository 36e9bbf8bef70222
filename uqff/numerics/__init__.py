"""Every packing, rounding and libm fact, once, on the reference side."""
