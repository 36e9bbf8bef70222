"""Write the tables of the spec and of the documentation's reference from layouts, the code's own tables and vectors.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; whatever is between them is replaced.  With
``--check`` nothing is written and any difference ends with exit status 1.

=======================  =================================================================================
name                     table
=======================  =================================================================================
``HEADER``, ``TENSOR``   offset table of a shared layout
``AFQ.LAYOUT``, ...      offset table of a family
``Q4K.BLOCK``, ...       offset table of a ggml block, ``F8Q8.BLOCK`` of an F8Q8 block
``AFQ.ENTRIES``, ...     entries of a family's 1.x layers
``VERSIONS``             versions of both generations
``FAMILIES``             type bytes
``DTYPES``               tensor dtypes
``GGML_TYPES``           ggml types with their sizes
``ARCHITECTURES``        order of the layers by architecture
``TOWERS``               layers of architectures that take images or sound
``PARTS``                field of a blob and entry of 1.x that hold the same
``SHAPES``               what shape a weight must have
``LIMITS``               bounds of a reader
``TOOL.LIMITS``          bounds of the commands on what is no file of the format
``RULES``                the rules of a reader, by id
``RULES page#section``   those of a section, with their reasons
``GGUF_FILE.HEAD``, ...  offset table of a part of a GGUF file's framing
``GGUF_FILE.LIMITS``     bounds of the reader of GGUF files
``GGUF_FILE.VALUES``     types of GGUF's metadata values
``GGUF_FILE.NAMES``      names of tensors in GGUF and in a model
``GGUF_FILE.MODELS``     architectures that are converted
``GGUF_FILE.PROJECTORS`` kinds of ``mmproj`` files that are converted
``GGUF_FILE.FOREIGN``    GGUF's types that UQFF does not have
``LAYOUT_KEYS``          the engine's keys in ``config.json``
``TOOL.LAYOUT_KEYS``     what the commands make of them
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
from typing import NamedTuple

import yaml

from tools.generated import settle
from tools.vectors.listings import LISTINGS, TAKEN_APART, VECTORS, markdown
from uqff import limits
from uqff.checkpoints.gguf import names
from uqff.checkpoints.gguf.projectors import PROJECTORS
from uqff.codes import ENTRY_VERSIONS, VERSIONS, DType, Family
from uqff.container.framing import DTYPE_BITS
from uqff.families import families
from uqff.families.f8q8 import tensor as f8q8
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.gguf import schema as gguf
from uqff.gguf.types import FOREIGN_TYPES
from uqff.models import layouts
from uqff.models.multimodal import MULTIMODAL
from uqff.models.shapes import SHAPES
from uqff.models.table import ARCHITECTURES
from uqff.models.text import TEXT, Group, Tower
from uqff.rules import RULES
from uqff.schema.entries import Entries
from uqff.schema.header import described_header
from uqff.schema.layout import Layout, size_terms
from uqff.schema.tensor import TENSOR

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "spec", ROOT / "docs" / "pages" / "reference")
"""Where pages with tables are."""

MARKED = re.compile(r"(<!-- table: (?P<name>[^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
RULE_WORDS = Path(__file__).with_name("rules.yml")
"""What pages say of each rule, beside its phrase."""
FORMAT_LIMITS = (
    "U32_MAX",
    "MAX_RANK",
    "MAX_ELEMENTS",
    "MAX_HEADER_BYTES",
    "MAX_WIDE_HEADER_BYTES",
    "MAX_HEADER_VALUES",
    "MAX_NAME",
    "MAX_SHARDS",
    "MAX_REPORT_BYTES",
)
"""Bounds on files of the format; all others are those of the tool."""


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


class _History(NamedTuple):
    """What is not in the tables of codes: how a version fits older readers, and the releases that know it."""

    fits: str
    written_by: str
    read_by: str


HISTORY = {
    "0.1.0": _History("initial", "0.3.x", "0.3 to 0.8.3"),
    "0.1.1": _History("additive", "–", "0.3 to 0.8.3"),
    "0.1.2": _History("additive", "0.5.0", "0.3 to 0.8.3"),
    "0.1.3": _History("additive", "0.6.0", "0.3 to 0.8.3"),
    "0.2.0": _History("reserved; additive", "0.7.0 to 0.8.3", "0.3 to 0.8.3"),
    "1.0.0": _History("breaking", "0.8.12", "from 0.8.12 on"),
    "1.1.0": _History("additive", "0.8.23", "from 0.8.23 on"),
    "1.2.0": _History("additive; retired", "0.9.2 to 0.9.5", "from 0.9.2 on"),
}


def version_table() -> str:
    """All versions, of both generations."""
    rows = []
    for version, change in {**VERSIONS, **ENTRY_VERSIONS}.items():
        word = version.major << 16 | version.minor << 8 | version.patch
        stored = f"`{word.to_bytes(4, 'little').hex(' ')}`" if version in VERSIONS else "entries"
        added = [f.title for f in Family if f.since == version] + [d.name for d in DType if d.since == version]
        history = HISTORY[str(version)]
        change = change.partition(" (mistral.rs")[0]
        rows.append((version, stored, history.fits, change, ", ".join(added), history.written_by, history.read_by))
    heads = ("version", "on disk", "class", "change", "families and dtypes since", "written by", "read by")
    return markdown(heads, rows)


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
    heads = ("architecture", "in `config.json`", "in front", "weights of a layer, in order")
    rows = (
        (
            a.title,
            _names(a.classes),
            f"`{a.decoder}.layers.i.`",
            "; ".join(_group(group) for group in a.groups if group.numbered) if a.numbered else "1.0 and later only",
        )
        for a in ARCHITECTURES
        if a.numbered or a in TEXT
    )
    return markdown(heads, rows)


def tower_table() -> str:
    """What architectures with towers have in 1.2."""
    heads = ("architecture", "in `config.json`", "language model", "head", "layers of towers")
    rows = (
        (
            a.title,
            _names(a.classes),
            f"`{a.decoder}`" if a.decoder else f"`{a.stack}`, `{a.embedding}`",
            f"`{a.head}`",
            "; ".join(map(_tower, a.towers)) or "none",
        )
        for a in MULTIMODAL
    )
    return markdown(heads, rows)


def _tower(tower: Tower) -> str:
    """The layers of a tower, and how many blocks have them."""
    fixed = "" if tower.default is None else str(tower.default)
    depth = f"`{tower.depth}`" if tower.depth else fixed
    depth += f" - {tower.less}" if tower.less else ""
    blocks = f"`{tower.path}.i`" if depth else f"`{tower.path}`"
    said = [*([_names(tower.paths)] if any(tower.paths) else []), *([f"i < {depth}"] if depth else [])]
    return f"{blocks} ({', '.join(said)})"


def _group(group: Group) -> str:
    """Weights, and which layers have them."""
    said = [word for word in ("of each expert" if group.stacked else "", group.when.text if group.when else "") if word]
    return f"{_names(group.paths)} ({', '.join(said)})" if said else _names(group.paths)


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


def limit_table(wanted: Callable[[str], bool]) -> str:
    """The bounds of some names, each with the reason that its docstring states."""
    statements = ast.parse(inspect.getsource(limits)).body
    rows = []
    for statement, below in itertools.pairwise(statements):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if not wanted(statement.target.id):
            continue
        if not isinstance(below, ast.Expr) or not isinstance(below.value, ast.Constant):
            raise TypeError(f"{statement.target.id} has no reason")
        name, reason = statement.target.id, " ".join(str(below.value.value).split())
        rows.append((f"`{name}`", f"{getattr(limits, name):,}", reason))
    return markdown(("bound", "value", "meaning and reason"), rows)


def section_rules(section: str) -> str:
    """The rules that stand in a section, with their reasons."""
    words = yaml.safe_load(RULE_WORDS.read_text("utf-8"))
    if words.keys() != RULES.keys():
        raise KeyError(f"{RULE_WORDS.name} and uqff/rules.py differ: {sorted(words.keys() ^ RULES.keys())}")
    rows = [
        (f"`{rule.id}`", words[rule.id].get("rule", rule.text), words[rule.id]["reason"])
        for rule in RULES.values()
        if rule.section == section
    ]
    if not rows:
        raise KeyError(f"no rules in {section}")
    return markdown(("id", "rule", "reason"), rows)


def of_format(name: str) -> bool:
    """Whether a bound is one on files of the format."""
    return name in FORMAT_LIMITS


def of_gguf(name: str) -> bool:
    """Whether a bound is one on GGUF files."""
    return name.startswith("MAX_GGUF_")


def of_tool(name: str) -> bool:
    """Whether a bound is none of these."""
    return not of_format(name) and not of_gguf(name)


def value_type_table() -> str:
    """Types of GGUF's metadata values."""

    def size(value_type: gguf.ValueType) -> object:
        return {"TEXT": "8 + bytes", "ARRAY": "12 + elements"}.get(value_type.name, value_type.struct.size)

    return markdown(("code", "type", "bytes"), ((t.number, t.name.lower(), size(t)) for t in gguf.ValueType))


def gguf_name_table() -> str:
    """Names of tensors."""
    pairs = [(theirs, ours) for ours, theirs in names.ROOT.items()]
    pairs += [(f"blk.N.{theirs}", f"model.layers.N.{ours}") for ours, theirs in names.BLOCK.items()]
    found: dict[str, list[str]] = {}
    for theirs, ours in pairs:
        found.setdefault(theirs, []).append(ours)
    return markdown(("GGUF", "model"), ((f"`{theirs}`", _names(ours)) for theirs, ours in found.items()))


def gguf_projector_table() -> str:
    """Kinds of ``mmproj`` files that are converted."""
    heads = ("`clip.projector_type`", "beside `general.architecture`", "in `config.json`")
    rows = ((f"`{a.kind}`", f"`{text}`", f"`{name}`") for a in PROJECTORS for text, name in a.texts.items())
    return markdown(heads, rows)


def gguf_model_table() -> str:
    """Architectures that are converted."""
    heads = ("`general.architecture`", "in `config.json`", "rows of Q and K", "biases", "norms of a layer")
    rows = (
        (
            f"`{a.name}`",
            _names(a.classes),
            "interleaved" if a.interleaved else "as in the model",
            _names(a.biases) or (f"if any: {_names(a.optional_biases)}" if a.optional_biases else "none"),
            _names(a.norms) + (", with biases" if a.norm_biases else ""),
        )
        for a in names.ARCHITECTURES
    )
    return markdown(heads, rows)


def gguf_foreign_table() -> str:
    """Types that UQFF does not have: their blocks, field by field."""

    def fields(layout: Layout) -> str:
        return "; ".join(f"`{row.field}` {row.type}: {row.meaning}" for row in layout.rows())

    rows = ((t.code, t.name, t.block_size, t.type_size, fields(t.layout)) for t in FOREIGN_TYPES)
    return markdown(("code", "type", "weights", "bytes", "fields of a block"), rows)


GGUF_PARTS = {"HEAD": gguf.HEAD, "TEXT": gguf.TEXT, "PAIR": gguf.PAIR, "ARRAY": gguf.ARRAY, "TENSOR": gguf.TENSOR}


def layout_key_table() -> str:
    """The engine's keys in ``config.json``."""
    rows = (
        (f"`{key.name}`", key.meaning, ", ".join(f"`{json.dumps(each)}`" for each in key.harmless))
        for key in layouts.KEYS
    )
    return markdown(("key", "meaning", "as in a checkpoint"), rows)


def handled_key_table() -> str:
    """What the commands make of them."""
    return markdown(("key", "what the commands do"), ((f"`{key.name}`", key.here) for key in layouts.KEYS))


TABLES: dict[str, Callable[[], str]] = {
    **LISTINGS,
    **_layout_tables(),
    **{f"GGUF_FILE.{name}": partial(offset_table, layout) for name, layout in GGUF_PARTS.items()},
    "GGUF_FILE.LIMITS": partial(limit_table, of_gguf),
    "GGUF_FILE.VALUES": value_type_table,
    "GGUF_FILE.NAMES": gguf_name_table,
    "GGUF_FILE.MODELS": gguf_model_table,
    "GGUF_FILE.PROJECTORS": gguf_projector_table,
    "GGUF_FILE.FOREIGN": gguf_foreign_table,
    "LAYOUT_KEYS": layout_key_table,
    "TOOL.LAYOUT_KEYS": handled_key_table,
    "VERSIONS": version_table,
    "FAMILIES": family_table,
    "DTYPES": dtype_table,
    "SAFETENSORS_DTYPES": safetensors_dtype_table,
    "GGML_TYPES": ggml_table,
    "ARCHITECTURES": architecture_table,
    "TOWERS": tower_table,
    "PARTS": part_table,
    "SHAPES": shape_table,
    "LIMITS": partial(limit_table, of_format),
    "TOOL.LIMITS": partial(limit_table, of_tool),
    "RULES": rule_table,
}


def table(name: str) -> str:
    """The table of a marker.

    Raises:
        KeyError: there is none of that name.
    """
    kind, _, argument = name.partition(" ")
    if kind == "RULES" and argument:
        return section_rules(argument)
    return TAKEN_APART[kind](argument) if kind in TAKEN_APART else TABLES[name]()


def rewritten(text: str) -> str:
    """A page with all its tables as they should be."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found['name'])}\n\n{found[3]}", text)


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on any difference")
    check = parser.parse_args().check
    pages = (page for folder in PAGES for page in sorted(folder.rglob("*.md")))
    return settle(((page, rewritten(page.read_text("utf-8"))) for page in pages), check=check)


if __name__ == "__main__":
    sys.exit(main())
