"""The first five bytes of a blob."""

from __future__ import annotations

import pytest

from uqff import Family, FormatError, UnsupportedError, Version
from uqff.codes import VERSIONS
from uqff.families import FAMILIES
from uqff.schema.header import HEADER


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", Family)
def test_bytes(version: Version, family: Family) -> None:
    """patch, minor, major, 0, type."""
    data = bytes([version.patch, version.minor, version.major, 0, family.value])
    fields = HEADER.read(data)
    assert (fields["version"], fields["quant_type"]) == (version, family)
    assert b"".join(HEADER.chunks(fields)) == data
    assert HEADER.fixed_size == 4 + 1 == len(data)


@pytest.mark.parametrize("first", ["version", "quant_type"])
def test_every_family_begins_with_the_header(first: str) -> None:
    """And ends with the bias."""
    for record in FAMILIES:
        names = [name for name, _, _ in record.LAYOUT.members]
        assert first in names[:2]
        assert names[-1] == "bias"
        assert names.index("bias_flag") == (3 if record.family is Family.GGUF else 2)


def test_version_is_looked_at_before_the_type() -> None:
    """A file of the future is newer, not of an unknown type."""
    with pytest.raises(UnsupportedError, match="unknown version"):
        HEADER.read(b"\0\0\1\0\x63")
    with pytest.raises(UnsupportedError, match="unknown type"):
        HEADER.read(b"\0\2\0\0\x63")
    with pytest.raises(FormatError, match="truncated"):
        HEADER.read(b"\0\2\0\0")
