"""``tests/golden``: files that the real clients wrote, made again: ``v0``, ``v1`` and ``gguf`` are commands."""
