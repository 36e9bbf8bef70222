"""The vectors for quantisers: the library makes every byte, by its kernels and by its reference paths."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import uqff
from uqff.quantization.types import KINDS
from uqff.simd import ENVIRONMENT_VARIABLE

FOLDER = Path(__file__).parents[2] / "spec" / "vectors" / "encode"
INDEX: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text("utf-8"))
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def matrix(entry: dict[str, Any]) -> torch.Tensor:
    """The weights of a vector."""
    raw = np.frombuffer((FOLDER / entry["input"]).read_bytes(), "<f4")
    return torch.from_numpy(raw.reshape(entry["shape"]).copy())


def test_every_type_has_a_vector() -> None:
    """In every load dtype that the type's bytes hang on, and Q8K as both generations of the engine make it."""
    assert {entry["kind"] for entry in INDEX} == set(KINDS)
    assert {entry["load_dtype"] for entry in INDEX} == set(DTYPES)
    assert {entry["engine"] for entry in INDEX if entry["kind"] == "q8k"} == {"0.6.0", "0.9.5"}
    present = {path.name for path in FOLDER.glob("*.bin")}
    assert present == {entry["file"] for entry in INDEX}


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: entry["file"])
def test_bytes(entry: dict[str, Any], kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blob is the stated one, bit for bit."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, kernels)
    blob = (FOLDER / entry["file"]).read_bytes()
    assert (len(blob), hashlib.sha256(blob).hexdigest()) == (entry["size"], entry["sha256"])
    engine: Any = entry["engine"][:3]
    record = uqff.quantize(matrix(entry), entry["kind"], dtype=DTYPES[entry["load_dtype"]], engine=engine)
    assert uqff.serialize(record, version=record.family.since) == blob
