"""F8Q8: blocks of 32 with a float8 scale."""

from uqff.families.f8q8.tensor import F8Q8

__all__ = ["F8Q8"]
