"""``make bench``: speed beside other tools."""
