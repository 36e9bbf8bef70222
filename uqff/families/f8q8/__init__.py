"""F8Q8: blocks of 32 with a float8 scale."""
