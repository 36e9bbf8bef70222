"""Versions, family ids and dtype codes: numbers that are stored in files and never change."""

from __future__ import annotations

import pytest
import torch

from tests.support.samples import DTYPE_CODES
from uqff import DType, Family, Version
from uqff.codes import FORMATS, VERSIONS
from uqff.families import FAMILIES, family_of


def test_versions() -> None:
    """The five that were ever written, in order."""
    assert [str(version) for version in VERSIONS] == ["0.1.0", "0.1.1", "0.1.2", "0.1.3", "0.2.0"]
    assert list(VERSIONS) == sorted(VERSIONS)
    assert Version(0, 1, 10) > Version(0, 1, 3)
    assert Version(0, 2, 0) == (0, 2, 0)


def test_family_ids() -> None:
    """The type bytes, the titles, and the version each came with."""
    assert [(f.value, f.title, str(f.since)) for f in Family] == [
        (0, "GGUF", "0.1.0"),
        (1, "Unquant", "0.1.0"),
        (2, "HQQ", "0.1.0"),
        (3, "FP8", "0.1.2"),
        (4, "AFQ", "0.1.3"),
        (5, "F8Q8", "0.2.0"),
        (6, "MXFP4", "0.2.0"),
    ]


def test_every_family_has_its_record_at_its_id() -> None:
    """Dispatch is by position: a family out of order would be read as another."""
    assert len(FAMILIES) == len(Family)
    for family in Family:
        assert family_of(family).family is family
        assert family_of(family).__name__ == family.title


def test_dtype_codes() -> None:
    """Code, item size, torch dtype; codes 10 to 13 are names only."""
    expected = [
        (0, "U8", 1, torch.uint8),
        (1, "U32", 4, torch.uint32),
        (2, "I32", 4, torch.int32),
        (3, "I64", 8, torch.int64),
        (4, "F16", 2, torch.float16),
        (5, "BF16", 2, torch.bfloat16),
        (6, "F32", 4, torch.float32),
        (7, "F64", 8, torch.float64),
        (8, "I16", 2, torch.int16),
        (9, "F8E4M3", 1, torch.float8_e4m3fn),
    ]
    assert [(d.code, d.name, d.itemsize, d.torch) for d in DType if d.storable] == expected
    assert [(d.code, d.name) for d in DType if not d.storable] == [
        (10, "F6E2M3"),
        (11, "F6E3M2"),
        (12, "F4"),
        (13, "F8E8M0"),
    ]
    assert {d.name: d.code for d in DType if d.storable} == DTYPE_CODES
    assert all(d.itemsize == d.torch.itemsize for d in DType if d.storable)


@pytest.mark.parametrize("dtype", list(DType))
def test_dtype_lookups_are_inverse(dtype: DType) -> None:
    """By code always; by torch and safetensors names only for what can be stored."""
    assert DType.of_code(dtype.code) is dtype
    assert repr(dtype) == f"DType.{dtype.name}"
    if dtype.storable:
        assert DType.of_torch(dtype.torch) is dtype
        assert DType.of_safetensors(dtype.safetensors) is dtype


def test_dtypes_of_others_have_no_code() -> None:
    """None, not a guess."""
    assert DType.of_code(14) is None
    assert DType.of_code(-1) is None
    assert DType.of_torch(torch.float8_e5m2) is None
    assert DType.of_torch(torch.bool) is None
    assert DType.of_safetensors("") is None
    assert DType.of_safetensors("I8") is None


def test_dtype_since() -> None:
    """I16 came with 0.1.1, F8E4M3 with 0.1.2, the reserved names with 0.2.0, all others were there."""
    later = {d.name: str(d.since) for d in DType if d.since != (0, 1, 0)}
    assert later == {
        "I16": "0.1.1",
        "F8E4M3": "0.1.2",
        **dict.fromkeys(["F6E2M3", "F6E3M2", "F4", "F8E8M0"], "0.2.0"),
    }


def test_formats_are_the_newest_versions_of_their_name() -> None:
    """What a user calls 0.1 is written as 0.1.3, the last of that name."""
    assert {name: str(version) for name, version in FORMATS.items()} == {
        "0.1": "0.1.3",
        "0.2": "0.2.0",
        "1.0": "1.0.0",
        "1.1": "1.1.0",
        "1.2": "1.2.0",
    }
