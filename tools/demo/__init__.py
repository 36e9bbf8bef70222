"""``make demo``: a real model quantised, opened again and compared."""
