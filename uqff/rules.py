"""The rules of the format that a reader checks, each once, with its id, which ``UqffError.rule`` names.

Ids are never given anew: a rule that no longer holds keeps its own, and a new one gets the next number.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["RULES", "FormatRule"]


class FormatRule(NamedTuple):
    """A rule that a file keeps.

    Attributes:
        id: letters of its page and a number.
        section: page and section below ``spec/`` that explain it.
        text: the rule, in a phrase.
    """

    id: str
    section: str
    text: str


_FRAMING, _SHARDS, _INDEX = "container.md#framing", "container.md#shards", "container.md#index"
_HEADER, _RECORD, _BIAS = "tensor.md#header", "tensor.md#record", "tensor.md#bias"
_FILES, _LAYERS = "entries.md#entries-of-a-file", "entries.md#layers"


def _numbered(prefix: str, *rules: tuple[str, str]) -> list[FormatRule]:
    return [FormatRule(f"{prefix}-{number:02}", *rule) for number, rule in enumerate(rules, 1)]


_ALL = [
    *_numbered(
        "FILE",
        (_FRAMING, "a file begins with the length of its header"),
        (_FRAMING, "a header has at most 100,000,000 bytes"),
        (_FRAMING, "the header lies within the file"),
        (_FRAMING, "the header is a JSON object in UTF-8 and begins with '{'"),
        (_FRAMING, "a header has at most 600,000 values"),
        (_FRAMING, "a key occurs once"),
        (_FRAMING, "numbers are not negative and have at most 19 digits"),
        (_FRAMING, "texts are Unicode, also those that are written as escapes"),
        (_FRAMING, "metadata is a map of texts"),
        (_FRAMING, "an entry has dtype, shape and data_offsets, nothing else"),
        (_FRAMING, "the dtype is one of safetensors"),
        (_FRAMING, "shape is a list of at most 8 integers from 0"),
        (_FRAMING, "data_offsets are two integers, the end not before the begin"),
        (_FRAMING, "the size follows from dtype and shape"),
        (_FRAMING, "the tensors fill the data: no overlap, no hole, nothing behind"),
        ("container.md#foreign", "a file of another kind is named as what it is"),
        (_SHARDS, "shard numbers run from 0 without a gap, each once"),
        (_INDEX, "a key is a decimal layer index"),
        (_INDEX, "a layer index occurs once"),
        (_INDEX, "a blob is a U8 tensor of one dimension"),
        (_SHARDS, "a model has at most 100,000 shards"),
    ),
    *_numbered(
        "BLOB",
        (_HEADER, "a field is there in full"),
        (_HEADER, "nothing follows the last field"),
        (_HEADER, "the version is one that was ever written: a little-endian word whose top byte is 0"),
        (_HEADER, "the type byte is 0 to 6"),
        ("README.md#versions", "a family does not occur before the version that introduced it"),
        ("README.md#versions", "a dtype does not occur before the version that introduced it"),
        (_BIAS, "the bias flag is 0 or 1"),
        (_BIAS, "a bias has one number per output: [out], or [experts, out]"),
        (_RECORD, "a length follows from dtype, or type, and shape"),
        (_RECORD, "the dtype code is known"),
        (_RECORD, "dtype codes 10 to 13 are reserved names"),
        (_RECORD, "a weight has 1 to 8 dimensions, none of them 0"),
    ),
    *_numbered(
        "ENT",
        (_LAYERS, "a layer has all entries of its family"),
        (_LAYERS, "a layer has no entries of another family"),
        (_LAYERS, "the family is a number U8 []"),
        (_LAYERS, "the family is one of 0 to 6"),
        (_LAYERS, "Unquant layers exist since 1.1"),
        (_LAYERS, "stacked weights of HQQ, FP8 and F8Q8 do not exist from 1.2 on"),
        (_LAYERS, "an entry has the dtype of its table"),
        (_LAYERS, "an entry has the dimensions of its table"),
        (_FILES, "all three version entries are there"),
        (_FILES, "major is 1, minor at most 2"),
        (_FILES, "a version entry is U32 []"),
        (_FILES, "no entry is named by a number: a file holds layers of one generation"),
        (_FILES, "the key of a layer is not empty"),
        (_FILES, "an entry of a known suffix has a format beside it"),
        (_FILES, "the version entries of all shards are equal"),
        (_FILES, "no other entry occurs twice in a set of shards"),
        (_LAYERS, "an entry has exactly the bytes that the others ask for"),
    ),
    *_numbered(
        "GGUF",
        ("families/gguf.md#layout", "the ggml type is one of the table"),
        ("families/gguf.md#layout", "a row is whole blocks"),
    ),
    *_numbered(
        "HQQ",
        ("families/hqq.md#layout", "bits is 1, 2, 3, 4 or 8"),
        ("families/hqq.md#layout", "a group has at least one weight"),
        ("families/hqq.md#layout", "axis is 0 or 1"),
        ("families/hqq.md#layout", "round_zeros is 0 or 1"),
        ("families/hqq.md#layout", "channel_wise is 0 or 1"),
        ("families/hqq.md#layout", "w_q is U8, for 3 bits I32"),
        ("families/hqq.md#layout", "scales are F32, F16 or BF16"),
        ("families/hqq.md#layout", "zeros have the dtype of scales"),
        ("families/hqq.md#layout", "the weight is whole groups"),
        ("families/hqq.md#layout", "the rows of M fill the packed elements"),
        ("families/hqq.md#layout", "w_q, scales and zeros fit the shape, the group size and the axis"),
    ),
    *_numbered(
        "FP8",
        ("families/fp8.md#layout", "the weight is F8E4M3"),
        ("families/fp8.md#layout", "the dtype of the codes is 9, F8E4M3"),
    ),
    *_numbered(
        "AFQ",
        ("families/afq.md#layout", "bits is 2, 3, 4, 6 or 8"),
        ("families/afq.md#layout", "group_size is 32, 64 or 128"),
        ("families/afq.md#layout", "w_q is U32"),
        ("families/afq.md#layout", "scales are F32, F16 or BF16"),
        ("families/afq.md#layout", "biases have the dtype of scales"),
        ("families/afq.md#layout", "a row is whole groups"),
        ("families/afq.md#layout", "scales and biases have one number per group"),
    ),
    *_numbered(
        "F8Q8",
        ("families/f8q8.md#layout", "there are as many blocks of 33 bytes as the shape needs"),
    ),
    *_numbered(
        "MXFP4",
        ("families/mxfp4.md#layout", "blocks and scales are U8"),
        ("families/mxfp4.md#layout", "a row is whole blocks"),
        ("families/mxfp4.md#layout", "scales have one exponent per block"),
    ),
]
RULES: Final[dict[str, FormatRule]] = {rule.id: rule for rule in _ALL}
"""Every rule, by id."""
