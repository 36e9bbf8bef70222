"""Vectors that the engine's own client wrote, cut out of the golden files: the smallest useful layer of each kind."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import load_file

from tools.vectors.good import Vector

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"

_FOLDERS = ("gguf", "unquant", "hqq", "fp8", "afq", "f8q8", "mxfp4")

_EDGE_64, _EDGE_256, _QWEN, _QWEN_F16 = "v0/llama-edge-64-f32", "v0/llama-edge-256-f32", "v0/qwen2-f32", "v0/qwen2-f16"

CHOICE = [
    *((_EDGE_64, kind, 0) for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "hqq4", "hqq8", "fp8")),
    *((_EDGE_64, kind, 0) for kind in ("afq2", "afq3", "afq4", "afq6", "afq8")),
    *((_EDGE_256, kind, 0) for kind in ("q2k", "q3k", "q4k", "q5k", "q6k", "q8k")),
    *((_QWEN, kind, 2) for kind in ("q4_0", "q4k", "hqq4", "afq4", "fp8")),
    *(("v0/qwen2-bf16", kind, 2) for kind in ("hqq4", "fp8", "afq4")),
    *((_QWEN_F16, kind, 2) for kind in ("q4_0", "hqq4", "fp8", "afq4", "afq6")),
    ("v0/llama-96-f32", "q4k", 0),
    ("v0/llama-mixed-f32", "q8_0", 9),
    ("v0/qwen2-unquant-bf16", "hqq8", 2),
    ("v0/qwen2-unquant-f16", "q4_0", 2),
]
"""Directory, kind of the file, index of the layer."""


def written_by_client() -> list[Vector]:
    """All of them, with client, version and command."""
    manifest = json.loads((GOLDEN / "MANIFEST.json").read_text())
    vectors = []
    for folder, kind, index in CHOICE:
        entry = manifest["directories"][folder]
        file = f"{folder}/{kind}-0.uqff"
        blob = load_file(GOLDEN / file)[str(index)].tobytes()
        layer, case = entry["layers"][index], folder.removeprefix("v0/")
        name = f"client-{case}-{kind}-{index}"
        provenance = {
            "kind": "client",
            "client": manifest["client"],
            "platform": manifest["platform"],
            "command": entry["command"],
            "file": f"tests/golden/{file}",
            "layer": str(index),
            "weight": f"{layer}.weight",
        }
        vectors.append(Vector(_FOLDERS[blob[4]], name, blob, f"{layer} of {case}, asked for {kind}", provenance))
    return vectors
