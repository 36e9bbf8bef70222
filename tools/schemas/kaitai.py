"""``uqff.ksy``: the layouts in the language of Kaitai Struct, https://kaitai.io."""

from __future__ import annotations

from typing import Any, Final

import yaml

from tools.schemas.fields import BLOCKS, DTYPES, OF_DTYPE, Field, body_of, fields_of, value_of
from uqff.codes import Family
from uqff.families import families
from uqff.families.gguf.blocks import BLOCK_TYPES
from uqff.schema.bricks import Dims, Span
from uqff.schema.entries import Entry
from uqff.schema.header import HEADER
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

NAME: Final = "uqff.ksy"

HEAD: Final = "# Generated from the declared layouts by `python -m tools.schemas`; not to be edited.\n"

ABOUT: Final = """\
UQFF, the Universal Quantized File Format of mistral.rs. A file is a safetensors file: the length of a header, the
header, which is JSON, and data. Kaitai Struct reads no JSON, so a program takes the place of each tensor out of the
header and reads its bytes with one of the types here: `blob` before 1.0; of 1.x the type that entries.json names for
the entry. Tensors fill the data without a gap, so `data.blobs` are all layers of a file of before 1.0. Floats of 8 and
16 bits are given as their bits. These types have the layout; rules that need more than one field are in the pages.
"""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts of several lines as such."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def entry_type(family: Family, entry: Entry, layout: Layout) -> str:
    """The type of an entry's content."""
    bricks = {name: brick for name, brick, _ in layout.members}
    brick = bricks[entry.field]
    if isinstance(brick, Layout):
        return "numbers"
    if isinstance(brick, Dims):
        return "dimensions"
    if isinstance(brick, Span):
        return value_of(layout, entry.field).holds
    return f"{family.name.lower()}_{entry.suffix.replace('.', '_')}"


def schema() -> str:
    """The text of the file."""
    document = {
        "meta": {
            "id": "uqff",
            "title": "Universal Quantized File Format of mistral.rs",
            "file-extension": "uqff",
            "license": "MIT",
            "ks-version": "0.11",
            "encoding": "UTF-8",
            "endian": "le",
        },
        "doc": ABOUT,
        "seq": [
            {"id": "len_header", "type": "u8", "doc": "bytes of the header", "valid": {"max": 100_000_000}},
            {"id": "header", "type": "str", "size": "len_header", "doc": "JSON; see container.md, framing"},
            {"id": "data", "type": "data", "size-eos": True},
        ],
        "types": _types(),
        "enums": _enums(),
    }
    return HEAD + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _types() -> dict[str, Any]:
    types: dict[str, Any] = {
        "data": {
            "doc": "the bytes of all tensors",
            "instances": {
                "blobs": {"pos": 0, "type": "blob", "repeat": "eos", "doc": "all layers, of a file of before 1.0 only"}
            },
        },
        "blob": _blob(),
    }
    for record in families():
        types[_body(record.family)] = {
            "doc": f"{record.family.title} before 1.0, behind the header",
            "seq": [_attribute(field) for field in body_of(record.LAYOUT)],
        }
    types["tensor"] = {"doc": "a tensor record R", "seq": [_attribute(field) for field in fields_of(TENSOR)]}
    types["numbers"] = _payload(
        "dtype",
        "numbers of one dtype; F16, BF16 and F8E4M3 as their bits",
        {f"dtype::{dtype.name.lower()}": OF_DTYPE[dtype] for dtype in DTYPES if dtype.storable},
    )
    types["ggml_blocks"] = _payload(
        "ggml_type",
        "blocks of a ggml type",
        {f"ggml_type::{each.kind}": f"block_{each.kind}" for each in BLOCK_TYPES},
    )
    types["f8q8_blocks"] = {
        "doc": "blocks of F8Q8",
        "instances": {"values": {"pos": 0, "type": "block_f8q8", "repeat": "eos"}},
    }
    for kind, layout in BLOCKS.items():
        types[f"block_{kind}"] = {"seq": [_attribute(field) for field in fields_of(layout)]}
    types["dimensions"] = {
        "doc": "entry `weight.shape`: dimensions in elements, outermost first",
        "seq": [{"id": "values", "type": "u4", "repeat": "eos", "valid": {"min": 1}}],
    }
    types["weight_format"] = {
        "doc": "entry `weight.format`",
        "seq": [{"id": "value", "type": "u1", "enum": "family", "valid": {"in-enum": True}}],
    }
    types["version_number"] = {
        "doc": "entries `uqff.version.major`, `.minor`, `.patch`",
        "seq": [{"id": "value", "type": "u4"}],
    }
    for record in families():
        for entry in record.ENTRIES.members:
            name = entry_type(record.family, entry, record.LAYOUT)
            if name not in types:
                field = value_of(record.LAYOUT, entry.field)
                number = {**_attribute(field), "id": "value"}
                types[name] = {"doc": f"entry `{entry.suffix}` of {record.family.title}", "seq": [number]}
    return types


def _body(family: Family) -> str:
    return f"{family.name.lower()}_body"


def _blob() -> dict[str, Any]:
    cases = {f"family::{family.name.lower()}": _body(family) for family in Family}
    return {
        "doc": "a layer before 1.0: one tensor of a file, whole",
        "seq": [
            *(_attribute(field) for field in fields_of(HEADER)),
            {"id": "body", "type": {"switch-on": "quant_type", "cases": cases}},
        ],
        "instances": {
            "major": {"value": "version >> 16"},
            "minor": {"value": "version >> 8 & 255"},
            "patch": {"value": "version & 255"},
        },
    }


def _payload(code: str, doc: str, cases: dict[str, str]) -> dict[str, Any]:
    """Elements of a type that a code says, which are read only when they are asked for."""
    kind = {"switch-on": "code", "cases": cases}
    return {
        "doc": doc,
        "params": [{"id": "code", "type": "u4", "enum": code}],
        "instances": {"values": {"pos": 0, "type": kind, "repeat": "eos"}},
    }


_ARGUMENTS: Final = {"numbers": "numbers(dtype)", "ggml_blocks": "ggml_blocks(ggml_dtype)"}


def _attribute(field: Field) -> dict[str, Any]:
    made: dict[str, Any] = {"id": field.name, "doc": field.meaning}
    if field.size:
        made |= {"size": field.size, "type": _ARGUMENTS.get(field.holds, field.holds)}
    else:
        made["type"] = field.number or field.holds
    if field.count is not None:
        made |= {"repeat": "expr", "repeat-expr": field.count}
    if field.flag:
        made["if"] = f"{field.flag} == 1"
    if field.enum:
        made |= {"enum": field.enum, "valid": {"in-enum": True}}
    elif field.allowed:
        made["valid"] = {"any-of": list(field.allowed)}
    elif field.least is not None or field.most is not None:
        made["valid"] = {
            name: value for name, value in (("min", field.least), ("max", field.most)) if value is not None
        }
    return made


def _enums() -> dict[str, dict[int, str]]:
    return {
        "family": {family.value: family.name.lower() for family in Family},
        "dtype": {dtype.code: dtype.name.lower() for dtype in DTYPES if dtype.storable},
        "ggml_type": {each.code: each.kind for each in BLOCK_TYPES},
    }
