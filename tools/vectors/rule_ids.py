"""Which rule a broken vector breaks: ids of :mod:`uqff.rules` for what the vectors say in their own words."""

from __future__ import annotations

from typing import Final

from uqff.rules import RULES

_BY_TEXT: Final = {rule.text: rule.id for rule in RULES.values()}
_SECTIONS: Final = {
    ("container.md#framing", "at most 8 dimensions"): "FILE-12",
    ("container.md#framing", "dimensions are integers from 0"): "FILE-12",
    ("entries.md#mxfp4", "a row is whole blocks"): "MXFP4-02",
    ("families/mxfp4.md#layout", "a row is whole blocks"): "MXFP4-02",
    ("entries.md#gguf", "the data is there, whatever the product of the shape"): "ENT-17",
}
_WORDS: Final = {
    "a row is whole blocks": "GGUF-02",
    "the header is a JSON object in UTF-8": "FILE-04",
    "the header begins with '{'": "FILE-04",
    "shard numbers run from 0 without a gap": "FILE-17",
    "a file of UQFF 1.x states its version in three entries": "ENT-09",
    "a blob has a header": "BLOB-01",
    "the data is there, whatever the product of the shape": "BLOB-01",
    "the version is one that was ever written": "BLOB-03",
    "the top byte of the version word is 0": "BLOB-03",
    "the version word is little endian": "BLOB-03",
    "errors within a blob are placed in the file": "BLOB-07",
    "a bias has one number per output": "BLOB-08",
    "a bias is [out], or [experts, out]": "BLOB-08",
    "length is the number of elements times their size": "BLOB-09",
    "data_length follows from type and shape": "BLOB-09",
    "at most 8 dimensions": "BLOB-12",
    "no dimension is 0": "BLOB-12",
    "a weight has at least one dimension": "BLOB-12",
    "a layer of two shards has all entries of its family": "ENT-01",
    "no entry is named by a number": "ENT-12",
    "a file holds layers of one generation": "ENT-12",
    "weight has exactly the bytes that type and shape ask for": "ENT-17",
    "weight is 33 bytes for each block, and there are as many blocks as the shape needs": "ENT-17",
    "the codes are U8, of 3 bits I32": "HQQ-06",
    "w_q fits shape, bits and group_size": "HQQ-11",
    "scales and zeros are [1, N] for axis 0, [N, 1] for axis 1": "HQQ-11",
    "weight, scales and zeros fit the shape, the group size and the axis": "HQQ-11",
    "the dtype of the codes is 9": "FP8-02",
    "the dtype of the codes is F8E4M3": "FP8-02",
    "blocks are U8": "MXFP4-01",
    "scales are U8": "MXFP4-01",
    "there are as many blocks as the shape needs": "F8Q8-01",
}
_VECTORS: Final = {
    "bad-entries/first-shard-missing-1": "ENT-09",
    "bad-entries/f8q8-blocks-more": "F8Q8-01",
    "bad-entries/f8q8-shape-larger": "F8Q8-01",
    "bad-entries/f8q8-shape-huge": "F8Q8-01",
    "bad-entries/hqq-group-size-other": "HQQ-09",
    "bad-entries/hqq-group-size-huge": "HQQ-09",
    "bad-entries/afq-biases-f64": "ENT-07",
}


def rule_id(vector: str, section: str, words: str) -> str:
    """The id of a rule.

    Args:
        vector: id of the vector.
        section: page and section that the vector names.
        words: the rule as the vector says it.

    Raises:
        KeyError: there is no such rule.
    """
    if vector in _VECTORS:
        return _VECTORS[vector]
    if words in ("scales and their companions have one dtype", "zeros have the dtype of scales"):
        return "AFQ-05" if section.endswith("#afq") else "HQQ-08"
    if words == "scales are F32, F16 or BF16":
        return "AFQ-04" if "afq" in section else "HQQ-07"
    return _SECTIONS.get((section, words)) or _WORDS.get(words) or _BY_TEXT[words]
