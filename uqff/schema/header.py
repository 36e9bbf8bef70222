"""What every pre-1.0 blob begins and ends with: version word, type byte, bias flag, bias extension.

::

    offset  0      1      2      3      4            5 ...                         end
            patch  minor  major  0      quant type   body of the family            [R bias]

The type byte is *always* at offset 4: readers look there before they know anything else.
Authority: mistral.rs, ``mistralrs-quant/src/utils/uqff.rs`` (``UQFF_VERSION``, ``UQFF_QUANT_TYPE_OFFSET``).
"""

from __future__ import annotations

from construct import Construct

from uqff.codes import VERSIONS, Family, Version
from uqff.errors import UnsupportedError
from uqff.schema.bricks import U8, U32, Checked, Derived, Violation
from uqff.schema.layout import Extension, Layout
from uqff.schema.tensor import TENSOR

__all__ = ["HEADER", "blob_layout", "described_header"]


def _decode_version(word: int) -> Version:
    version = Version(word >> 16, word >> 8 & 0xFF, word & 0xFF)
    if version in VERSIONS:
        return version
    known = ", ".join(map(str, VERSIONS))
    raise Violation("unknown version", rule="BLOB-03", expected=f"one of {known}", got=version, error=UnsupportedError)


def _encode_version(version: Version) -> int:
    word = version[0] << 16 | version[1] << 8 | version[2]
    if _decode_version(word) != version:
        raise Violation(
            "unknown version", rule="BLOB-03", expected="numbers that fit a byte", got=version, error=UnsupportedError
        )
    return word


def _decode_family(number: int) -> Family:
    family = Family.of_code(number)
    if family is None:
        known = ", ".join(f"{f.value} {f.title}" for f in Family)
        raise Violation("unknown type", rule="BLOB-04", expected=f"one of {known}", got=number, error=UnsupportedError)
    return family


VERSION_WORD = Checked(U32, _decode_version, _encode_version, label="version")
QUANT_TYPE = Checked(U8, _decode_family, int)
BIAS_FLAG = Derived(Checked.choice(U8, 0, 1, rule="BLOB-07"), lambda blob: blob.get("bias") is not None)

_VERSION = "version" / VERSION_WORD * "format version: the bytes are patch, minor, major, 0"
_TYPE_MEANING = "family of the blob, always at offset 4: {}"

HEADER = Layout(_VERSION, "quant_type" / QUANT_TYPE * "family of the blob, always at offset 4")
"""The first five bytes, by which a reader chooses the layout of the whole blob."""


def described_header() -> Layout:
    """:data:`HEADER` with the families that are known."""
    known = ", ".join(f"{family.value} {family.title}" for family in Family)
    return Layout(_VERSION, "quant_type" / QUANT_TYPE * _TYPE_MEANING.format(known))


def blob_layout(family: Family, *body: Construct) -> Layout:
    """The layout of a whole blob of one family: header, body, bias extension."""
    return Layout(
        _VERSION,
        "quant_type" / QUANT_TYPE * _TYPE_MEANING.format(f"{family.value} = {family.title}"),
        *body,
        "bias" / Extension("bias_flag", TENSOR) * "bias of the layer, present if `bias_flag` is 1",
    )
