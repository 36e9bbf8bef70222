"""Every bound that protects a reader from hostile or broken input, with its reason.

The rule behind all of them: nothing is allocated beyond the input's size plus a constant, and time is linear in it.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_HEADER_VALUES",
    "MAX_MODEL_LAYERS",
    "MAX_PATTERN",
    "MAX_RANK",
    "MAX_REPORT_BYTES",
    "MAX_SHARDS",
    "MAX_SUMS_BYTES",
    "U32_MAX",
]

U32_MAX: Final = 2**32 - 1
"""Largest length, dimension or count that a pre-1.0 field can state."""

MAX_RANK: Final = 8
"""Most dimensions of a tensor. Weights have 2 or 3, biases 1; a claim of 2**32 - 1 must not be allocated."""

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest safetensors header (the reference implementation's own limit): JSON is parsed whole, so it is bounded."""

MAX_HEADER_VALUES: Final = 1_000_000
"""Most values in a header, a report or a configuration, counted by `,`, `[` and `{`: small ones outgrow their text."""

MAX_SHARDS: Final = 100_000
"""Most shard files in a set: the number in a file name must not make a reader count to 10**30."""

MAX_CONFIG_BYTES: Final = 10_000_000
"""Longest ``config.json`` or recipe: parsed whole, and a few kilobytes in practice."""

MAX_REPORT_BYTES: Final = 100_000_000
"""Longest ``uqff_report.json``: parsed whole; a model of a thousand layers in twenty types has some 5 MB."""

MAX_SUMS_BYTES: Final = 100_000_000
"""Longest list of checksums: read whole, and some hundred bytes a file or layer."""

MAX_MODEL_LAYERS: Final = 200_000
"""Most weights that a configuration may announce: its numbers are multiplied before any weight is looked for."""

MAX_PATTERN: Final = 500
"""Most states of a compiled pattern over layer names: matching costs their number times the length of the name."""
