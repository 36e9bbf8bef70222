"""Write the tables of the spec from the declared layouts, the code's own tables and the vectors.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; whatever is between them is replaced.  With
``--check`` nothing is written and any difference ends with exit status 1.

=======================  =================================================================================
name                     table
=======================  =================================================================================
``HEADER``, ``TENSOR``   offset table of a shared layout
``AFQ.LAYOUT``, ...      offset table of a family
``Q4K.BLOCK``, ...       offset table of a ggml block, ``F8Q8.BLOCK`` of an F8Q8 block
``AFQ.ENTRIES``, ...     entries of a family's 1.x layers
``VERSIONS``             versions with what each added
``ENTRY_VERSIONS``       1.x versions with what each added
``FAMILIES``             type bytes
``DTYPES``               tensor dtypes
``GGML_TYPES``           ggml types with their sizes
``ARCHITECTURES``        order of the layers by architecture
``PARTS``                field of a blob and entry of 1.x that hold the same
``SHAPES``               what shape a weight must have
``LIMITS``               bounds of a reader
``RULES``                the rules of a reader, by id
``GGUF_FILE.HEAD``, ...  offset table of a part of a GGUF file's framing
``GGUF_FILE.LIMITS``     bounds of the reader of GGUF files
``GGUF_FILE.VALUES``     types of GGUF's metadata values
``GGUF_FILE.NAMES``      names of tensors in GGUF and in a model
``GGUF_FILE.MODELS``     architectures that are converted
``LAYOUT_KEYS``          the engine's keys in ``config.json``
``EXAMPLE folder/name``  a vector, field by field
``VECTORS``              index of the valid vectors
``FILES``                index of the valid files
``BAD``                  index of the broken blobs and files
``ENTRY_VECTORS``        index of the valid 1.x files
``BAD_ENTRIES``          index of the broken 1.x files
``ENCODINGS``            index of the vectors for quantisers
``ENTRY_EXAMPLE name``   a 1.x file, entry by entry
``ENTRY_DUMP name``      the same, all bytes
=======================  =================================================================================
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from uqff import limits
from uqff.codes import ENTRY_VERSIONS, VERSIONS, DType, Family
from uqff.container.framing import DTYPE_BITS
from uqff.conversion import names
from uqff.families import families
from uqff.families.f8q8 import tensor as f8q8
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.gguf import schema as gguf
from uqff.models import layouts
from uqff.models.architectures import ARCHITECTURES
from uqff.models.shapes import SHAPES
from uqff.rules import RULES
from uqff.schema.entries import Entries
from uqff.schema.header import described_header
from uqff.schema.layout import Layout, size_terms
from uqff.schema.tensor import TENSOR

SPEC = Path(__file__).parents[2] / "spec"
VECTORS = SPEC / "vectors"

MARKED = re.compile(r"(<!-- table: (?P<name>[^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
TOOL_LIMITS = {"MAX_PATTERN"}
"""Bounds on what users write, not on files of the format."""
SHOWN_BYTES = 8
"""Bytes of a field that a worked example shows; of longer ones, the first."""


def markdown(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    heads = list(heads)
    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


def offset_table(layout: Layout) -> str:
    """Offset, size, field, type, meaning."""
    rows = ((r.offset, r.size, f"`{r.field}`", r.type, r.meaning) for r in layout.rows())
    return markdown(("offset", "size", "field", "type", "meaning"), rows)


def block_table(layout: Layout) -> str:
    """An offset table and the sum of its sizes."""
    sizes = [size_terms(brick)[0] for _, brick, _ in layout.members]
    total = f" = {layout.fixed_size}" if len(sizes) > 1 else ""
    return f"{offset_table(layout)}\n\nSize: {' + '.join(map(str, sizes))}{total} bytes."


def _layout_tables() -> dict[str, Callable[[], str]]:
    tables: dict[str, Callable[[], str]] = {
        "HEADER": lambda: offset_table(described_header()),
        "TENSOR": lambda: offset_table(TENSOR),
    }
    for record in families():
        tables[f"{record.family.name}.LAYOUT"] = lambda layout=record.LAYOUT: offset_table(layout)  # type: ignore[misc]
        tables[f"{record.family.name}.ENTRIES"] = lambda entries=record.ENTRIES: entry_table(entries)  # type: ignore[misc]
    for block_type in BLOCK_TYPES:
        tables[f"{block_type.name}.BLOCK"] = lambda layout=block_type.layout: block_table(layout)  # type: ignore[misc]
    tables["F8Q8.BLOCK"] = lambda: block_table(f8q8.BLOCK)
    return tables


def entry_table(entries: Entries) -> str:
    """Suffix, dtype, shape, meaning; the two entries that every family has are left out."""
    rows = ((f"`{e.suffix}`", e.dtype_label, f"`{e.shape_label}`", e.since, e.meaning) for e in entries.members)
    return markdown(("suffix", "dtype", "shape", "since", "meaning"), rows)


def entry_version_table() -> str:
    """1.x versions with their history."""
    return markdown(("version", "history"), ENTRY_VERSIONS.items())


def version_table() -> str:
    """Versions with their word."""
    rows = []
    for version, adds in VERSIONS.items():
        word = version.major << 16 | version.minor << 8 | version.patch
        families = ", ".join(f.title for f in Family if f.since == version)
        dtypes = ", ".join(d.name for d in DType if d.since == version)
        rows.append((version, f"`{word.to_bytes(4, 'little').hex(' ')}`", adds, families, dtypes))
    return markdown(("version", "bytes on disk", "history", "families since", "dtypes since"), rows)


def family_table() -> str:
    """Type bytes."""
    rows = ((f.value, f"[{f.title}](families/{f.name.lower()}.md)", f.since) for f in Family)
    return markdown(("type byte", "family", "since"), rows)


def dtype_table() -> str:
    """Tensor dtypes."""
    rows = (
        (d.code, d.name, d.itemsize if d.storable else "reserved", d.safetensors or "", d.since)
        for d in sorted(DType, key=lambda d: d.code)
    )
    return markdown(("code", "dtype", "bytes per element", "name in safetensors", "since"), rows)


def safetensors_dtype_table() -> str:
    """What may stand in the header of a file."""
    return markdown(("dtype", "bits per element"), ((f"`{name}`", bits) for name, bits in DTYPE_BITS.items()))


def ggml_table() -> str:
    """Ggml types with their sizes."""

    def row(t: BlockType) -> tuple[object, ...]:
        fields = ", ".join(f"`{name}` {size_terms(brick)[0]}" for name, brick, _ in t.layout.members)
        return t.code, t.name, t.block_size, t.type_size, f"{8 * t.type_size / t.block_size:g}", fields

    return markdown(
        ("code", "type", "weights per block", "bytes per block", "bits per weight", "fields and bytes"),
        map(row, BLOCK_TYPES),
    )


def architecture_table() -> str:
    """Order of the layers."""
    heads = ("architecture", "in `config.json`", "in front", "weights of a layer", "each expert", "in place of experts")
    rows = (
        (
            a.title,
            _names(a.classes),
            f"`{a.prefix}model.layers.i.`",
            _names(a.block),
            _names(a.experts),
            _names(a.dense),
        )
        for a in ARCHITECTURES
    )
    return markdown(heads, rows)


def part_table() -> str:
    """The field of a blob and the entry of a 1.x layer that hold the same."""
    rows = (
        (record.family.title, f"`{entry.field}`", f"`{entry.suffix}`")
        for record in families()
        for entry in record.ENTRIES.members
    )
    return markdown(("family", "field of the blob", "entry"), rows)


def shape_table() -> str:
    """What shape a weight must have."""
    rows = ((f"`{path}`", f"`[{out}, {inputs}]`") for path, (out, inputs) in SHAPES.items())
    return markdown(("weight", "shape"), rows)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def rule_table() -> str:
    """Every rule with its id, where it is explained, and how many vectors break it."""
    index = json.loads((VECTORS / "index.json").read_text("utf-8"))
    broken = Counter(case["rule"] for case in index if "rule" in case)
    rows = (
        (f"`{rule.id}`", rule.text, f"[{rule.section.replace('#', ', ')}]({rule.section})", broken[rule.id] or "")
        for rule in RULES.values()
    )
    return markdown(("id", "rule", "explained in", "vectors"), rows)


def limit_table(*, of_gguf: bool = False) -> str:
    """Each bound with the reason that its docstring states: those of GGUF files, or all others."""
    statements = ast.parse(inspect.getsource(limits)).body
    rows = []
    for statement, below in itertools.pairwise(statements):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if statement.target.id in TOOL_LIMITS or statement.target.id.startswith("MAX_GGUF_") != of_gguf:
            continue
        if not isinstance(below, ast.Expr) or not isinstance(below.value, ast.Constant):
            raise TypeError(f"{statement.target.id} has no reason")
        name, reason = statement.target.id, " ".join(str(below.value.value).split())
        rows.append((f"`{name}`", f"{getattr(limits, name):,}", reason))
    return markdown(("bound", "value", "meaning and reason"), rows)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors
# ---------------------------------------------------------------------------------------------------------------------


def _vector(name: str) -> tuple[dict[str, Any], bytes]:
    return json.loads((VECTORS / f"{name}.json").read_text("utf-8")), (VECTORS / f"{name}.bin").read_bytes()


def example_table(name: str) -> str:
    """A vector, field by field, with the sum of the sizes."""
    vector, blob = _vector(name)
    rows = []
    for field in vector["fields"]:
        raw = blob[field["offset"] : field["offset"] + field["size"]]
        shown = raw[:SHOWN_BYTES].hex(" ") + (" …" if len(raw) > SHOWN_BYTES else "")
        value = field.get("means", field.get("value", ""))
        rows.append((field["offset"], field["size"], f"`{shown}`", f"`{field['path']}`", value))
    sizes = " + ".join(str(field["size"]) for field in vector["fields"])
    table = markdown(("offset", "size", "bytes", "field", "value"), rows)
    return f"{table}\n\nTotal: {sizes} = {len(blob)} bytes. File: `vectors/{name}.bin`."


def vector_index() -> str:
    """All valid vectors."""
    rows = []
    for family in Family:
        folder = family.name.lower()
        for path in sorted((VECTORS / folder).glob("*.json")):
            vector, _ = _vector(f"{folder}/{path.stem}")
            bias = vector["bias"]["dtype"] if vector["bias"] else ""
            source = vector["provenance"].get("client", "synthetic")
            link = f"[{folder}/{path.stem}]({folder}/{path.name})"
            shape = "×".join(map(str, vector["shape"]))
            rows.append((link, vector["kind"], vector["version"], shape, bias, vector["size"], source, vector["note"]))
    heads = ("vector", "kind", "version", "shape", "bias", "bytes", "source", "what for")
    return f"{len(rows)} vectors.\n\n{markdown(heads, rows)}"


def file_index() -> str:
    """All valid files."""
    index = json.loads((VECTORS / "container" / "index.json").read_text("utf-8"))
    rows = (
        (f"[{e['file']}]({e['file']})", ", ".join(f"`{layer['key']}`" for layer in e["layers"]), e["note"])
        for e in index
    )
    return markdown(("file", "keys by index", "what for"), rows)


def bad_index() -> str:
    """All broken files."""
    index = json.loads((VECTORS / "bad" / "index.json").read_text("utf-8"))
    rows = []
    for e in index:
        rule = f"[{e['rule']}](../../{e['section']})"
        where = "" if e["field"] is None else f"`{_visible(e['field'])}`"
        rows.append((f"[{e['file']}]({e['file']})", rule, e["error"], where, e["offset"]))
    return f"{len(rows)} files.\n\n{markdown(('file', 'violated rule', 'error', 'field', 'offset'), rows)}"


def _models() -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in sorted((VECTORS / "entries").glob("*.json"))]


def entry_vector_index() -> str:
    """All valid 1.x files."""
    rows = []
    for model in _models():
        kinds = ", ".join(dict.fromkeys(layer["kind"] for layer in model["layers"]))
        shapes = ", ".join(dict.fromkeys("×".join(map(str, layer["shape"])) for layer in model["layers"]))
        size = sum(file["size"] for file in model["files"])
        link = f"[{model['name']}]({model['name']}.json)"
        rows.append((link, model["version"], len(model["files"]), kinds, shapes, size, model["note"]))
    heads = ("vector", "version", "shards", "kinds", "shapes", "bytes", "what for")
    return f"{len(rows)} vectors.\n\n{markdown(heads, rows)}"


def bad_entry_index() -> str:
    """All broken 1.x files."""
    index = json.loads((VECTORS / "bad-entries" / "index.json").read_text("utf-8"))
    rows = []
    for e in index:
        files = ", ".join(f"[{name}]({name})" for name in e["files"])
        rule = f"[{e['rule']}](../../{e['section']})"
        near = f"[{e['near_miss']}](../entries/{e['near_miss']}.json)"
        where = "" if e["field"] is None else f"`{_visible(e['field'])}`"
        offset = "" if e["offset"] is None else e["offset"]
        rows.append((files, rule, e["error"], where, offset, near))
    heads = ("files", "violated rule", "error", "field", "offset", "near miss")
    return f"{len(rows)} models.\n\n{markdown(heads, rows)}"


def encoding_index() -> str:
    """All vectors for quantisers."""
    index = json.loads((VECTORS / "encode" / "index.json").read_text("utf-8"))
    rows = (
        (f"[{e['file']}]({e['file']})", e["kind"], e["input"], e["load_dtype"], e["engine"], e["size"]) for e in index
    )
    return f"{len(index)} blobs.\n\n{markdown(('file', 'kind', 'weights', 'load dtype', 'engine', 'bytes'), rows)}"


def entry_example_table(name: str) -> str:
    """A 1.x file, entry by entry in the order of the bytes."""
    model = json.loads((VECTORS / "entries" / f"{name}.json").read_text("utf-8"))
    data = (VECTORS / "entries" / f"{name}.uqff").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    rows: list[tuple[object, ...]] = [
        (0, 8, f"`{data[:8].hex(' ')}`", "", f"header of {begin - 8} bytes"),
        (8, begin - 8, "`7b 22 …`", "", "the header: JSON, padded with spaces"),
    ]
    for entry in model["entries"]:
        raw = data[entry["offset"] : entry["offset"] + entry["size"]]
        shown = raw[:SHOWN_BYTES].hex(" ") + (" …" if len(raw) > SHOWN_BYTES else "")
        kind = f"{entry['dtype']} `{entry['shape']}`"
        meaning = f"{kind} {entry['value']}" if "value" in entry else kind
        rows.append((entry["offset"], entry["size"], f"`{shown}`", f"`{entry['name']}`", meaning))
    sizes = " + ".join(str(row[1]) for row in rows)
    table = markdown(("offset", "size", "bytes", "entry", "value"), rows)
    return f"{table}\n\nTotal: {sizes} = {len(data)} bytes. File: `vectors/entries/{name}.uqff`."


def entry_dump(name: str) -> str:
    """All bytes of a 1.x file, 16 a line, each entry beginning a line of its own."""
    model = json.loads((VECTORS / "entries" / f"{name}.json").read_text("utf-8"))
    data = (VECTORS / "entries" / f"{name}.uqff").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    parts = [(0, 8, f"length of the header: {begin - 8}")]
    parts += [(8, begin - 8, "")]
    for entry in model["entries"]:
        value = f" = {entry['value']}" if "value" in entry else ""
        parts.append((entry["offset"], entry["size"], f"{entry['name']}{value}"))
    lines = ["```", "offset  bytes                                            meaning"]
    for offset, size, meaning in parts:
        for at in range(offset, offset + size, 16):
            raw = data[at : min(at + 16, offset + size)]
            shown = meaning if meaning and at == offset else raw.decode() if not meaning else ""
            lines.append(f"{at:<7} {raw.hex(' '):<48} {shown}".rstrip())
    return "\n".join([*lines, f"{len(data):<7} end", "```"])


def _visible(name: str) -> str:
    return name if name.isascii() and name.isprintable() else name.encode("unicode_escape").decode()


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


def value_type_table() -> str:
    """Types of GGUF's metadata values."""

    def size(value_type: gguf.ValueType) -> object:
        return {"TEXT": "8 + bytes", "ARRAY": "12 + elements"}.get(value_type.name, value_type.struct.size)

    return markdown(("code", "type", "bytes"), ((t.number, t.name.lower(), size(t)) for t in gguf.ValueType))


def gguf_name_table() -> str:
    """Names of tensors."""
    blocks = {f"blk.N.{theirs}": f"model.layers.N.{ours}" for ours, theirs in names.BLOCK.items()}
    roots = {theirs: ours for ours, theirs in names.ROOT.items()}
    return markdown(("GGUF", "model"), ((f"`{a}`", f"`{b}`") for a, b in {**roots, **blocks}.items()))


def gguf_model_table() -> str:
    """Architectures that are converted."""
    heads = ("`general.architecture`", "in `config.json`", "rows of Q and K", "biases", "norms of a layer")
    rows = (
        (
            f"`{a.name}`",
            _names(a.classes),
            "interleaved" if a.interleaved else "as in the model",
            _names(a.biases) or (f"if any: {_names(a.optional_biases)}" if a.optional_biases else "none"),
            _names(a.norms),
        )
        for a in names.ARCHITECTURES
    )
    return markdown(heads, rows)


GGUF_PARTS = {"HEAD": gguf.HEAD, "TEXT": gguf.TEXT, "PAIR": gguf.PAIR, "ARRAY": gguf.ARRAY, "TENSOR": gguf.TENSOR}


def layout_key_table() -> str:
    """The engine's keys in ``config.json``."""
    rows = (
        (f"`{key.name}`", key.meaning, ", ".join(f"`{json.dumps(each)}`" for each in key.harmless), key.here)
        for key in layouts.KEYS
    )
    return markdown(("key", "meaning", "as in a checkpoint", "here"), rows)


TABLES: dict[str, Callable[[], str]] = {
    **_layout_tables(),
    **{f"GGUF_FILE.{name}": partial(offset_table, layout) for name, layout in GGUF_PARTS.items()},
    "GGUF_FILE.LIMITS": partial(limit_table, of_gguf=True),
    "GGUF_FILE.VALUES": value_type_table,
    "GGUF_FILE.NAMES": gguf_name_table,
    "GGUF_FILE.MODELS": gguf_model_table,
    "LAYOUT_KEYS": layout_key_table,
    "VERSIONS": version_table,
    "ENTRY_VERSIONS": entry_version_table,
    "FAMILIES": family_table,
    "DTYPES": dtype_table,
    "SAFETENSORS_DTYPES": safetensors_dtype_table,
    "GGML_TYPES": ggml_table,
    "ARCHITECTURES": architecture_table,
    "PARTS": part_table,
    "SHAPES": shape_table,
    "LIMITS": limit_table,
    "VECTORS": vector_index,
    "FILES": file_index,
    "RULES": rule_table,
    "BAD": bad_index,
    "ENTRY_VECTORS": entry_vector_index,
    "BAD_ENTRIES": bad_entry_index,
    "ENCODINGS": encoding_index,
}


def table(name: str) -> str:
    """The table of a marker.

    Raises:
        KeyError: there is none of that name.
    """
    kind, _, argument = name.partition(" ")
    of_vectors = {"EXAMPLE": example_table, "ENTRY_EXAMPLE": entry_example_table, "ENTRY_DUMP": entry_dump}
    return of_vectors[kind](argument) if kind in of_vectors else TABLES[name]()


def rewritten(text: str) -> str:
    """A page with all its tables as they should be."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found['name'])}\n\n{found[3]}", text)


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on any difference")
    check = parser.parse_args().check
    stale = []
    for page in sorted(SPEC.rglob("*.md")):
        text = page.read_text("utf-8")
        wanted = rewritten(text)
        if wanted != text:
            stale.append(page)
            print(f"{'differs' if check else 'written'}: {page.relative_to(SPEC.parent)}")
            if not check:
                page.write_text(wanted, "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
