"""MXFP4: OCP microscaling, fp4 with a shared exponent."""
