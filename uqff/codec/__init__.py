"""One layer as bytes: a pre-1.0 blob, or the entries of 1.x."""
