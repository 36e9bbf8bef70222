"""Every bound that protects a reader from hostile or broken input, with its reason.

The rule behind all of them: nothing is allocated beyond the input's size plus a constant, and time is linear in it.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "MAX_BLOCKS",
    "MAX_CONFIG_BYTES",
    "MAX_DIGITS",
    "MAX_ELEMENTS",
    "MAX_GGUF_ARRAY",
    "MAX_GGUF_NAME",
    "MAX_GGUF_PAIRS",
    "MAX_GGUF_RANK",
    "MAX_GGUF_TENSORS",
    "MAX_HEADER_BYTES",
    "MAX_HEADER_VALUES",
    "MAX_HUB_FILES",
    "MAX_MODEL_LAYERS",
    "MAX_NAME",
    "MAX_PATTERN",
    "MAX_RANK",
    "MAX_RECIPE_BYTES",
    "MAX_RECIPE_RULES",
    "MAX_REPORT_BYTES",
    "MAX_SHARDS",
    "MAX_SUMS_BYTES",
    "MAX_TEMPLATE_BYTES",
    "MAX_TEMPLATE_MEMORY",
    "MAX_TEMPLATE_SECONDS",
    "MAX_TEMPLATE_TEXT",
    "MAX_TEXT_BYTES",
    "MAX_TEXT_GROWTH",
    "MAX_TEXT_PREPENDED",
    "MAX_TOKENS",
    "MAX_TOKENS_TEXT",
    "MAX_TOKEN_TEXT",
    "MAX_TOKEN_TYPES",
    "MAX_WIDE_HEADER_BYTES",
    "U32_MAX",
]

U32_MAX: Final = 2**32 - 1
"""Largest length, dimension or count that a pre-1.0 field can state."""

MAX_HUB_FILES: Final = 1_000_000
"""Most files of a repository: all are listed before one is looked at; the hub itself advises against 100,000."""

MAX_RANK: Final = 8
"""Most dimensions of a tensor. Weights have 2 or 3, biases 1; a claim of 2**32 - 1 must not be allocated."""

MAX_ELEMENTS: Final = 2**60
"""Product of the dimensions that are not 0, which an empty tensor may state freely: strides of it must fit 63 bits."""

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest safetensors header (the reference implementation's own limit): JSON is parsed whole, so it is bounded."""

MAX_WIDE_HEADER_BYTES: Final = 10_000_000
"""Longest header or report that has a character beyond ASCII: one of them makes Python store all in four bytes each."""

MAX_HEADER_VALUES: Final = 600_000
"""Most values in a header, a report or a configuration, counted by `,`, `[` and, twice, `{`: small ones outgrow their
text, a list within a list takes 104 bytes of Python's for its 2."""

MAX_NAME: Final = 65_535
"""Most characters of a key in a header: names become keys of layers and parts of messages, each a copy; the bound for
tensors of GGUF files, and the longest known have some hundred."""

MAX_SHARDS: Final = 100_000
"""Most shard files in a set: the number in a file name must not make a reader count to 10**30."""

MAX_DIGITS: Final = 308
"""Most digits of an integer in a document: what has more is infinite as a float, or an OverflowError."""

MAX_CONFIG_BYTES: Final = 10_000_000
"""Longest ``config.json``: parsed whole, and a few kilobytes in practice."""

MAX_RECIPE_BYTES: Final = 100_000
"""Longest recipe: YAML takes a hundred times its size, and long; a few kilobytes in practice."""

MAX_RECIPE_RULES: Final = 256
"""Most selectors in a recipe: each is tried on each weight of a model."""

MAX_GGUF_PAIRS: Final = 10_000
"""Most metadata pairs of a GGUF file: each becomes Python objects ten times its size; models have some fifty."""

MAX_GGUF_TENSORS: Final = 100_000
"""Most tensors of a GGUF file: likewise; the largest models have some thousands."""

MAX_GGUF_ARRAY: Final = 10_000_000
"""Most elements of a metadata array: it is walked through on opening; vocabularies have up to half a million merges."""

MAX_GGUF_NAME: Final = 65_535
"""Longest key or tensor name of a GGUF file, in bytes: the specification's own bound for keys."""

MAX_GGUF_RANK: Final = 4
"""Most dimensions of a tensor of a GGUF file: ggml's own bound."""

MAX_TOKENS: Final = 600_000
"""Most tokens, or merges, of a GGUF file that a tokenizer is made of: Python objects of fifty times their size; the
largest vocabularies have 262,144 tokens and some 500,000 merges."""

MAX_TOKEN_TYPES: Final = 50_000
"""Most of these that are not ordinary, each an object in ``tokenizer.json``; models have up to 7,000."""

MAX_TEXT_GROWTH: Final = 4096
"""Times as long as a text a tokenizer may make it, by the types of its rules; those of models come to some 1,000 at
most, nearly all for compatibility forms and tables of characters, which make few texts longer."""

MAX_TEXT_PREPENDED: Final = 1024
"""Most characters that a tokenizer's normalizer puts in front of a text; those of models put one."""

MAX_TOKEN_TEXT: Final = 512
"""Longest token of a GGUF file that is cut into pairs, in characters: each cut costs its length."""

MAX_TOKENS_TEXT: Final = 5_000_000
"""Most characters of all tokens that are cut into pairs, one cut each; the largest vocabularies have some 2 million."""

MAX_REPORT_BYTES: Final = 100_000_000
"""Longest ``uqff_report.json``: parsed whole; a model of a thousand layers in twenty types has some 5 MB."""

MAX_SUMS_BYTES: Final = 100_000_000
"""Longest list of checksums: read whole, and some hundred bytes a file or layer."""

MAX_MODEL_LAYERS: Final = 200_000
"""Most weights that a configuration may announce: its numbers are multiplied before any weight is looked for."""

MAX_BLOCKS: Final = 2_000
"""Most decoder layers that a configuration may announce: likewise; the deepest models have some 130."""

MAX_PATTERN: Final = 500
"""Most states of a compiled pattern over layer names, and members of its classes: matching costs their number times
the length of the name."""

MAX_TEXT_BYTES: Final = 1_000_000_000
"""Longest text that a model is measured or calibrated with: read whole, as is the list of its tokens."""

MAX_TEMPLATE_BYTES: Final = 1_000_000
"""Longest chat template: compiled whole, to many times its size; the longest known have some 20 kB."""

MAX_TEMPLATE_SECONDS: Final = 0.5
"""Processor time to compile and render a chat template, a program of strangers; milliseconds in practice."""

MAX_TEMPLATE_MEMORY: Final = 64_000_000
"""Bytes that rendering may take beside Jinja itself and eight times the variables: see ``MAX_TEMPLATE_SECONDS``."""

MAX_TEMPLATE_TEXT: Final = 1_000_000
"""Most characters that a chat template may add to what it is given: they become tokens, which a model must read."""
