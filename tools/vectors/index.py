"""``vectors/index.json``: every vector in one list, for programs; made from the descriptions of the single ones.

{"id": "gguf/q4_0", "class": "pre-1.0 reader", "files": ["gguf/q4_0.bin"], "outcome": "accept",
 "description": "gguf/q4_0.json"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from tools.vectors.rule_ids import rule_id
from uqff.rules import RULES

INDEX: Final = "index.json"
SCHEMA: Final = "index.schema.json"

PRE_1, ENTRIES, ENCODER = "pre-1.0 reader", "1.x reader", "engine-exact encoder"
CLASSES: Final = (PRE_1, ENTRIES, ENCODER)
"""What a vector is for: what an implementation claims to be."""

ACCEPT, REFUSE, ENCODE = "accept", "refuse", "encode"


def case_schema() -> dict[str, Any]:
    """The JSON schema of the index."""
    text = {"type": "string"}
    properties: dict[str, Any] = {
        "id": text | {"description": "unique; a path without suffix"},
        "class": {"enum": list(CLASSES), "description": "what an implementation claims to be"},
        "files": {
            "type": "array",
            "items": text,
            "minItems": 1,
            "description": "below vectors/: one blob (.bin), or all shards of a model in order (.uqff)",
        },
        "outcome": {"enum": [ACCEPT, REFUSE, ENCODE], "description": "what to do with it, or how the files are made"},
        "description": text | {"description": "accept: the JSON file that has all fields and weights"},
        "section": text | {"description": "refuse: page and section that state the rule"},
        "rule": {"enum": list(RULES), "description": "refuse: id of the rule that is broken"},
        "words": text | {"description": "refuse: the rule, or what of it is broken"},
        "error": text | {"description": "refuse: class of the error; informative"},
        "field": {"type": ["string", "null"], "description": "refuse: field or entry at fault; informative"},
        "offset": {"type": "integer", "minimum": 0, "description": "refuse: where; informative"},
        "near_miss": text | {"description": "refuse: id of the valid vector that it was made from"},
        "input": text | {"description": "encode: the weights, little-endian f32, row major"},
        "shape": {"type": "array", "items": {"type": "integer"}, "description": "encode: of the weights"},
        "kind": text | {"description": "encode: the type to make"},
        "load_dtype": {"enum": ["F32", "F16", "BF16"], "description": "encode: dtype of the model"},
        "engine": text | {"description": "encode: release whose rules hold"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Vectors of UQFF",
        "type": "array",
        "items": {
            "type": "object",
            "required": ["id", "class", "files", "outcome"],
            "properties": properties,
            "additionalProperties": False,
        },
    }


def cases(files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    """Every case.

    Args:
        files: of ``spec/vectors/``, by path.
    """
    for path in sorted(path for path in files if path.endswith(".json")):
        folder, name = PurePosixPath(path).parent.name, PurePosixPath(path).stem
        described = json.loads(files[path])
        if name != "index":
            shards = [f"{folder}/{each['file']}" for each in described.get("files", [{"file": f"{name}.bin"}])]
            kind = ENTRIES if folder == "entries" else PRE_1
            yield _case(f"{folder}/{name}", kind, shards, ACCEPT, description=path)
        elif folder == "container":
            for each in described:
                yield _case(_id(folder, each["file"]), PRE_1, [f"{folder}/{each['file']}"], ACCEPT, description=path)
        elif folder == "encode":
            for each in described:
                yield _case(
                    _id(folder, each["file"]),
                    ENCODER,
                    [f"{folder}/{each['file']}"],
                    ENCODE,
                    input=f"{folder}/{each['input']}",
                    **{key: each[key] for key in ("shape", "kind", "load_dtype", "engine")},
                )
        else:
            yield from _broken(folder, described)


def _broken(folder: str, described: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in described:
        shards = each.get("files") or [each["file"]]
        more = {key: each[key] for key in ("section", "error", "field", "offset")}
        more |= {"rule": rule_id(_id(folder, shards[0]), each["section"], each["rule"]), "words": each["rule"]}
        if "near_miss" in each:
            more["near_miss"] = f"entries/{each['near_miss']}"
        kind = ENTRIES if folder == "bad-entries" else PRE_1
        yield _case(_id(folder, shards[0]), kind, [f"{folder}/{shard}" for shard in shards], REFUSE, **more)


def _id(folder: str, file: str) -> str:
    return f"{folder}/{PurePosixPath(file).stem}"


def _case(name: str, wanted: str, shards: list[str], outcome: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "class": wanted, "files": shards, "outcome": outcome, **more}


def index_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The index and its schema.

    Args:
        files: all others, by path.
    """
    rows = ",\n".join(f" {json.dumps(case, ensure_ascii=False)}" for case in cases(files))
    return {
        INDEX: f"[\n{rows}\n]\n".encode(),
        SCHEMA: (json.dumps(case_schema(), indent=1, ensure_ascii=False) + "\n").encode(),
    }
