"""``spec/schemas``: what is published for other programs is what the code declares, and reads the vectors."""

from __future__ import annotations

import json
import re

import pytest

from tools.schemas import compiled
from tools.schemas.__main__ import files
from tools.schemas.compiled import SCHEMAS
from uqff.families.gguf.blocks import BLOCK_TYPES


@pytest.fixture
def compiler() -> None:
    """Looked for when a test begins: ``make interop`` may get it while other tests run."""
    if not (compiled.TOOLS / "ready").exists():
        pytest.skip("make interop gets the compiler of Kaitai Struct")


def test_schemas_agree_with_the_code() -> None:
    """Nothing was changed by hand, and nothing forgotten."""
    generated = files()
    assert {name: (SCHEMAS / name).read_text("utf-8") for name in generated} == generated
    assert {path.name for path in SCHEMAS.iterdir()} == {*generated, "README.md"}


def test_blocks_of_the_pattern_have_the_right_sizes() -> None:
    """ImHex's structures take as many bytes as the blocks that they describe."""
    sizes = {"u8": 1, "s8": 1, "u16": 2, "s16": 2, "u32": 4, "float": 4}
    text = (SCHEMAS / "uqff.hexpat").read_text("utf-8")
    assert text.count("{") - text.count("'{'") == text.count("}")
    for block_type in BLOCK_TYPES:
        (body,) = re.findall(rf"^struct Block{block_type.name} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
        fields = re.findall(r"^    (\w+) \w+(?:\[(\d+)\])?;", body, re.MULTILINE)
        assert sum(sizes[kind] * int(count or 1) for kind, count in fields) == block_type.type_size, block_type.name


def test_every_entry_has_a_type() -> None:
    """The types that ``entries.json`` names are in ``uqff.ksy``."""
    entries = json.loads((SCHEMAS / "entries.json").read_text("utf-8"))
    named = {each["kaitai"] for family in entries["families"] for each in family["entries"]}
    named |= {each["kaitai"] for place in ("of_files", "of_all_layers") for each in entries[place]}
    types = re.findall(r"^  (\w+):$", (SCHEMAS / "uqff.ksy").read_text("utf-8"), re.MULTILINE)
    assert named <= set(types)


@pytest.mark.usefixtures("compiler")
def test_what_the_compiler_makes_reads_all_valid_vectors() -> None:
    """Fields and payloads are those that the vectors state."""
    rows = compiled.check_all()
    assert rows is not None
    assert [row for row in rows if row.problem is not None] == []
    assert len(rows) == sum(
        case["outcome"] == "accept" for case in json.loads((compiled.VECTORS / "index.json").read_text("utf-8"))
    )


@pytest.mark.usefixtures("compiler")
def test_wrong_schemas_are_noticed() -> None:
    """A block that is a byte short, and a field of another name."""
    text = (SCHEMAS / "uqff.ksy").read_text("utf-8")
    changes = (("repeat-expr: 12\n", "repeat-expr: 11\n"), ("id: dequant_x_scale", "id: x_scale"))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    index = json.loads((compiled.VECTORS / "index.json").read_text("utf-8"))
    reader = compiled.Reader(compiled.compiled(text))
    cases = {case["id"]: case for case in index}
    assert reader.problem(cases["gguf/q3k"]) is not None
    assert reader.problem(cases["fp8/bias-f32"]) is not None
    assert reader.problem(cases["gguf/q8_0"]) is None
