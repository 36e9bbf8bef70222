"""``make interop``: the real clients read what the package writes, and the other way round."""
