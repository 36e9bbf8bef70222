"""The tables of the spec that list vectors, and that take single ones apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from uqff.codes import Family

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"

SHOWN_BYTES = 8
"""Bytes of a field that a worked example shows; of longer ones, the first."""


def markdown(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    heads = list(heads)
    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


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


def rules_broken() -> dict[str, str]:
    """The rule that each file breaks, by its path below ``vectors/``."""
    index = json.loads((VECTORS / "index.json").read_text("utf-8"))
    return {file: case["rule"] for case in index if "rule" in case for file in case["files"]}


def bad_index() -> str:
    """All broken files."""
    ids = rules_broken()
    index = json.loads((VECTORS / "bad" / "index.json").read_text("utf-8"))
    rows = []
    for e in index:
        rule = f"[{e['rule']}](../../{e['section']})"
        where = "" if e["field"] is None else f"`{_visible(e['field'])}`"
        rows.append(
            (f"[{e['file']}]({e['file']})", f"`{ids['bad/' + e['file']]}`", rule, e["error"], where, e["offset"])
        )
    return f"{len(rows)} files.\n\n{markdown(('file', 'id', 'violated rule', 'error', 'field', 'offset'), rows)}"


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
    ids = rules_broken()
    index = json.loads((VECTORS / "bad-entries" / "index.json").read_text("utf-8"))
    rows = []
    for e in index:
        files = ", ".join(f"[{name}]({name})" for name in e["files"])
        rule = f"[{e['rule']}](../../{e['section']})"
        near = f"[{e['near_miss']}](../entries/{e['near_miss']}.json)"
        where = "" if e["field"] is None else f"`{_visible(e['field'])}`"
        offset = "" if e["offset"] is None else e["offset"]
        rows.append((files, f"`{ids['bad-entries/' + e['files'][0]]}`", rule, e["error"], where, offset, near))
    heads = ("files", "id", "violated rule", "error", "field", "offset", "near miss")
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


LISTINGS: dict[str, Callable[[], str]] = {
    "VECTORS": vector_index,
    "FILES": file_index,
    "BAD": bad_index,
    "ENTRY_VECTORS": entry_vector_index,
    "BAD_ENTRIES": bad_entry_index,
    "ENCODINGS": encoding_index,
}
"""Tables of all vectors of a folder, by name."""
TAKEN_APART: dict[str, Callable[[str], str]] = {
    "EXAMPLE": example_table,
    "ENTRY_EXAMPLE": entry_example_table,
    "ENTRY_DUMP": entry_dump,
}
"""Tables of a single vector, which stands behind the name."""
