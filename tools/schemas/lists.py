"""The tables of the spec as JSON, for programs: dtypes, ggml types, entries of 1.x."""

from __future__ import annotations

import json
from typing import Any

from tools.schemas.kaitai import entry_type
from uqff.codes import ENTRY_VERSIONS, VERSIONS, DType
from uqff.container.framing import DTYPE_BITS
from uqff.families import families
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.schema.entries import BIAS_RULE, FORMAT, Entry


def dtypes() -> dict[str, Any]:
    """Those of safetensors, with their sizes, and those of blobs, with their codes."""
    return {
        "about": "safetensors: what may stand in the header of a file; blobs: codes of tensor records before 1.0",
        "safetensors": [{"name": name, "bits": bits} for name, bits in DTYPE_BITS.items()],
        "blobs": [
            {
                "code": dtype.code,
                "name": dtype.name,
                "bytes": dtype.itemsize if dtype.storable else None,
                "safetensors": dtype.safetensors or None,
                "since": str(dtype.since),
            }
            for dtype in sorted(DType, key=lambda each: each.code)
        ],
    }


def ggml_types() -> dict[str, Any]:
    """The ggml types with the sizes and fields of their blocks."""
    return {
        "about": "ggml types of GGUF layers; offsets and sizes of fields in bytes",
        "types": [_ggml_type(each) for each in BLOCK_TYPES],
    }


def _ggml_type(block_type: BlockType) -> dict[str, Any]:
    rows = block_type.layout.rows()
    return {
        "code": block_type.code,
        "name": block_type.name,
        "weights_per_block": block_type.block_size,
        "bytes_per_block": block_type.type_size,
        "fields": [
            {
                "name": row.field,
                "offset": int(row.offset),
                "size": int(row.size),
                "type": row.type,
                "meaning": row.meaning,
            }
            for row in rows
        ],
    }


def entries() -> dict[str, Any]:
    """The entries of each family's layers, and those of files."""
    return {
        "about": "entries of UQFF 1.x: suffixes follow the layer's key and a full stop; '...' stands for any number of "
        "dimensions; kaitai names the type of uqff.ksy",
        "versions": {"blobs": list(map(str, VERSIONS)), "entries": list(map(str, ENTRY_VERSIONS))},
        "of_files": [
            {"name": f"uqff.version.{part}", "dtypes": ["U32"], "shape": [], "kaitai": "version_number"}
            for part in ("major", "minor", "patch")
        ],
        "of_all_layers": [
            {"suffix": FORMAT, "dtypes": ["U8"], "shape": [], "required": True, "kaitai": "weight_format"},
            _entry(BIAS_RULE, "numbers") | {"required": False},
        ],
        "families": [
            {
                "code": record.family.value,
                "name": record.family.title,
                "since": {"blobs": str(record.family.since), "entries": str(record.ENTRIES.since)},
                "stacked_before": str(record.ENTRIES.stacked_before) if record.ENTRIES.stacked_before else None,
                "entries": [
                    _entry(each, entry_type(record.family, each, record.LAYOUT)) for each in record.ENTRIES.members
                ],
            }
            for record in families()
        ],
    }


def _entry(entry: Entry, kaitai: str) -> dict[str, Any]:
    return {
        "suffix": entry.suffix,
        "dtypes": [dtype.safetensors for dtype in entry.dtypes],
        "shape": list(entry.dims),
        "meaning": entry.meaning,
        "kaitai": kaitai,
    }


def as_text(document: dict[str, Any]) -> str:
    """A document as the file has it: a member of a list in each line."""
    parts = []
    for name, value in document.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(each, ensure_ascii=False)}" for each in value)
            parts.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
