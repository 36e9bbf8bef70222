"""The quantisers against the files the 0.6.0 client wrote from the same weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from tools.tiny.models import TinyModel, round_to
from uqff.families.gguf import reference_quantize as quantize
from uqff.families.gguf.search import largest_magnitude, search_q3_scale

ROOT = Path(__file__).resolve().parents[3]

GOLDEN = ROOT / "tests" / "golden"
DIRECTORIES: dict[str, Any] = json.loads((GOLDEN / "MANIFEST.json").read_text())["directories"]

GGUF = 0
NAME_OF_GGML_DTYPE = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2K",
    11: "Q3K",
    12: "Q4K",
    13: "Q5K",
    14: "Q6K",
    15: "Q8K",
}
ZERO_SIGN_IS_FREE = {"Q4_1": 2, "Q5_1": 2, "Q4K": 2, "Q5K": 2}
"""Offset of the f16 whose zero has the sign the client's compiler chose."""

FILES = [
    (directory, file)
    for directory, about in DIRECTORIES.items()
    for file, facts in about["files"].items()
    if str(facts.get("isq", "")).startswith("q")
]


def gguf_layers(directory: str, file: str) -> Iterator[tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Of every ggml layer of a golden file: the type's name, the client's blocks, the weight's blocks."""
    about = DIRECTORIES[directory]
    tensors = TinyModel(**about["model"]).tensors()
    with safe_open(GOLDEN / directory / file, "numpy") as blobs:
        for index, layer in enumerate(about["layers"]):
            blob = blobs.get_tensor(str(index)).tobytes()
            if blob[4] != GGUF:
                continue
            length, _bias, code, ndim = struct.unpack_from("<IBII", blob, 5)
            shape = struct.unpack_from(f"<{ndim}I", blob, 18)
            weight = round_to(tensors[f"{layer}.weight"], about["dtype"])
            assert weight.shape == shape
            name = NAME_OF_GGML_DTYPE[code]
            blocks = weight.reshape(-1, 256 if name.endswith("K") else 32)
            data = np.frombuffer(blob, np.uint8, length, 18 + 4 * ndim)
            yield name, data.reshape(len(blocks), -1), blocks


def with_positive_zero(name: str, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The blocks with -0.0 made 0.0 where the client's sign means nothing."""
    blocks = blocks.copy()
    if name in ZERO_SIGN_IS_FREE:
        at = ZERO_SIGN_IS_FREE[name]
        negative_zero = (blocks[:, at] == 0x00) & (blocks[:, at + 1] == 0x80)
        blocks[negative_zero, at + 1] = 0x00
    return blocks


def largest_without_a_negative_first(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the 0.6.0 wheel does for Q3K in place of what its source says."""
    values = values.copy()
    values[0] = np.where(values[0] < 0, np.float32(0), values[0])
    return largest_magnitude(values)


@pytest.mark.parametrize(("directory", "file"), FILES)
def test_the_reference_writes_the_clients_bytes(directory: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of every ggml layer; Q3K with the wheel's way to choose the super-scale."""
    found = 0
    for name, expected, x in gguf_layers(directory, file):
        with monkeypatch.context() as patch:
            if name == "Q3K":
                patch.setattr(quantize, "largest_magnitude", largest_without_a_negative_first)
            actual = quantize.QUANTIZERS[name](x)
        np.testing.assert_array_equal(with_positive_zero(name, actual), with_positive_zero(name, expected))
        found += 1
    assert found > 0


def test_every_type_is_among_the_golden_files() -> None:
    names = {name for directory, file in FILES for name, _, _ in gguf_layers(directory, file)}
    assert names == set(quantize.QUANTIZERS)


def test_q3k_differs_from_the_060_wheel_only_where_the_wheel_skips_sub_block_0() -> None:
    """The reference follows the source: it differs only where sub-block 0 decides, and is negative."""
    blocks = differing = 0
    for directory, file in FILES:
        for name, expected, x in gguf_layers(directory, file):
            if name != "Q3K":
                continue
            different = (quantize.quantize_q3k(x) != expected).any(axis=1)
            with np.errstate(all="ignore"):
                scales = search_q3_scale(np.ascontiguousarray(x.reshape(-1, 16).T)).reshape(-1, 16)
            first = scales[:, 0]
            decides = (first < 0) & (np.abs(first) == np.abs(scales).max(axis=1))
            assert not (different & ~decides).any()
            blocks += len(x)
            differing += int(different.sum())
    assert 0 < differing < 0.1 * blocks
