"""``uqff.hexpat``: the layouts in the pattern language of ImHex, https://imhex.werwolv.net."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from tools.schemas.fields import BLOCKS, DTYPES, OF_DTYPE, VERSION_WORDS, Field, body_of, fields_of
from uqff.codes import Family
from uqff.families import families
from uqff.families.gguf.blocks import BLOCK_TYPES
from uqff.schema.tensor import TENSOR

NAME: Final = "uqff.hexpat"

HEAD: Final = """\
#pragma author The uqff project
#pragma description UQFF, the Universal Quantized File Format of mistral.rs
#pragma endian little
#pragma array_limit 0x10000000
#pragma pattern_limit 0x10000000

// Generated from the declared layouts by `python -m tools.schemas`; not to be edited.
//
// Two kinds of files: a blob alone, which begins with a version word; and a safetensors file, which begins with the
// length of its header. Its tensors fill the data without a gap, so the data of a file of before 1.0 are blobs, one
// behind the other. The pattern language reads no JSON: of 1.x the data are shown as bytes, on which blocks can be put
// by hand, as entries.json says.

#include <std/mem.pat>
#include <std/io.pat>
"""
_NUMBERS: Final = {
    "u1": "u8",
    "s1": "s8",
    "u2": "u16",
    "s2": "s16",
    "u4": "u32",
    "s4": "s32",
    "s8": "s64",
    "f4": "float",
    "f8": "double",
}
_ENUMS: Final = {"family": "Family", "dtype": "Dtype", "ggml_type": "GgmlType"}


def schema() -> str:
    """The text of the file."""
    parts = [HEAD]
    parts += [
        _enum("Family", "u8", {family.value: family.title for family in Family}),
        _enum("Dtype", "u32", {dtype.code: dtype.name for dtype in DTYPES if dtype.storable}),
        _enum("GgmlType", "u32", {each.code: each.name for each in BLOCK_TYPES}),
    ]
    parts += [_struct(_block(kind), fields_of(layout)) for kind, layout in BLOCKS.items()]
    parts.append(_struct("Tensor", fields_of(TENSOR), "a tensor record R"))
    for record in families():
        fields = [field for field in body_of(record.LAYOUT) if field.name != "bias"]
        lines = [*_members(fields), "    if (bias_flag == 1)", "        Tensor bias;"]
        parts.append(_braced(f"struct {_body(record.family)}", lines))
    parts.append(_blob())
    parts.append(_file())
    return "\n".join(parts)


def _enum(name: str, number: str, values: dict[int, str]) -> str:
    return _braced(f"enum {name} : {number}", [f"    {text} = {code}," for code, text in values.items()])


def _struct(name: str, fields: Iterable[Field], about: str = "") -> str:
    text = _braced(f"struct {name}", _members(fields))
    return f"// {about}\n{text}" if about else text


def _braced(head: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{head} {{", *lines, "};", ""])


def _block(kind: str) -> str:
    return f"Block{kind.upper()}"


def _body(family: Family) -> str:
    return f"{family.name.title()}Body"


def _members(fields: Iterable[Field]) -> Iterator[str]:
    for field in fields:
        comment = f"  // {field.meaning}"
        if field.size:
            yield from _payload(field, comment)
        elif field.holds:
            yield f"    {field.holds.title()} {field.name};{comment}"
        else:
            kind = _ENUMS.get(field.enum) or _NUMBERS[field.number]
            count = "" if field.count is None else f"[{field.count}]"
            yield f"    {kind} {field.name}{count};{comment}"
            if field.most is not None:
                yield f'    if ({field.name} > {field.most}) std::error("more than {field.most} dimensions");'


def _payload(field: Field, comment: str) -> Iterator[str]:
    if field.holds == "f8q8_blocks":
        count = field.size.removeprefix(f"{BLOCKS['f8q8'].fixed_size} * ")
        yield f"    {_block('f8q8')} {field.name}[{count}];{comment}"
        return
    code, elements = (
        ("dtype", {f"Dtype::{d.name}": (_NUMBERS[OF_DTYPE[d]], d.itemsize) for d in DTYPES if d.storable})
        if field.holds == "numbers"
        else ("ggml_dtype", {f"GgmlType::{t.name}": (_block(t.kind), t.type_size) for t in BLOCK_TYPES})
    )
    yield f"    match ({code}) {{{comment}"
    for name, (kind, size) in elements.items():
        yield f"        ({name}): {kind} {field.name}[{field.size} / {size}];"
    yield "    }"


def _blob() -> str:
    words = " && ".join(f"version != {word:#x}" for word in VERSION_WORDS)
    cases = [f"        (Family::{family.title}): {_body(family)} body;" for family in Family]
    lines = [
        "    u32 version;  // major << 16 | minor << 8 | patch",
        f'    if ({words}) std::error("no version of before 1.0");',
        "    Family quant_type;",
        "    match (quant_type) {",
        *cases,
        "    }",
    ]
    return "// A layer before 1.0.\n" + _braced("struct Blob", lines)


def _search(name: str, text: str) -> str:
    found = f"std::mem::find_sequence_in_range(0, 8, 8 + header_length, {', '.join(map(hex, text.encode()))})"
    return f"// Whether {text} stands in the header.\n" + _braced(
        f"fn {name}(u64 header_length)", [f"    u64 at = {found};", "    return at < 8 + header_length;"]
    )


_IS_BLOB: Final = f"""\
// Whether a blob can begin at an address: there is the word of a version before 1.0.
fn is_blob(u64 address) {{
    u32 word = std::mem::read_unsigned(address, 4, std::mem::Endian::Little);
    return {" || ".join(f"word == {word:#x}" for word in VERSION_WORDS)};
}};
"""


def _file() -> str:
    shard = [
        "    u64 header_length;",
        "    char header[header_length];  // JSON; see container.md, framing",
        "    if (has_layers(header_length) || has_version(header_length) || !is_blob(8 + header_length))",
        "        u8 data[while(!std::mem::eof())];",
        "    else",
        "        Blob blobs[while(!std::mem::eof())];",
    ]
    place = [
        "    // A blob ends with the file; behind such a length a file would have '{' at byte 8.",
        "    if (is_blob(0) && std::mem::read_unsigned(8, 1) != 0x7b)",
        "        Blob blob;",
        "    else",
        "        Shard shard;",
    ]
    parts = [
        _IS_BLOB,
        _search("has_layers", ".weight.format"),
        _search("has_version", "uqff.version."),
        "// A safetensors file.\n" + _braced("struct Shard", shard),
        _braced("struct Uqff", place),
        "Uqff uqff @ 0x00;\n",
    ]
    return "\n".join(parts)
