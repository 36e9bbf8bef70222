"""HQQ: half-quadratic quantisation."""
