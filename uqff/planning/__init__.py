"""Which layer gets which type: the best quality for a size, or the smallest size for a quality."""
