"""Vectors for quantisers: a matrix of weights, and the blob that each type makes of it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.vectors import encoder, rows
from tools.vectors.wire import Chance, f32
from uqff.simd import ENVIRONMENT_VARIABLE

FOLDER = "encode"
DIRECTORY = Path(__file__).parents[2] / "spec" / "vectors" / FOLDER
COLUMNS = 256
WEIGHTS, EDGES = "weights", "edges"
OF_TENSOR = ("hqq4", "hqq8", "fp8")
"""Types whose bytes hang on all weights of a tensor."""

GGML = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2k", "q3k", "q4k", "q5k", "q6k", "q8k")
KINDS = (*GGML, "hqq4", "hqq8", "fp8", "afq2", "afq3", "afq4", "afq6", "afq8", "f8q8", "mxfp4")
IN_EVERY_DTYPE = ("q4k", "q8_0", "hqq4", "fp8", "afq3", "afq4", "f8q8", "mxfp4")


class Matrix(NamedTuple):
    """Weights ``[rows, 256]``, float32."""

    name: str
    raw: bytes

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.raw) // (4 * COLUMNS), COLUMNS


class Case(NamedTuple):
    """One blob; ``engine`` is the release whose rules it follows."""

    kind: str
    dtype: str = "F32"
    engine: str = "0.9.5"
    matrix: str = WEIGHTS

    @property
    def name(self) -> str:
        """Of the file, without suffix."""
        parts = [self.kind, "" if self.matrix == WEIGHTS else self.matrix]
        parts += ["" if self.dtype == "F32" else self.dtype.lower(), self.engine if self.old else ""]
        return "-".join(filter(None, parts))

    @property
    def old(self) -> bool:
        """Before mistral.rs 0.9."""
        return self.engine < "0.9"


def cases() -> Iterator[Case]:
    """All of them."""
    yield from map(Case, KINDS)
    yield from (Case(kind, dtype) for kind in IN_EVERY_DTYPE for dtype in ("F16", "BF16"))
    yield Case("q8k", engine="0.6.0")
    yield from (Case(kind, matrix=EDGES) for kind in KINDS if kind not in OF_TENSOR)
    yield Case("q8k", engine="0.6.0", matrix=EDGES)
    yield from (Case(kind, matrix=name) for name, (kinds, _) in rows.TENSORS.items() for kind in kinds)


def matrices() -> Iterator[Matrix]:
    """All weights."""
    yield Matrix(WEIGHTS, weights())
    yield Matrix(EDGES, rows.edges().astype("<f4").tobytes())
    yield from (Matrix(name, make().astype("<f4").tobytes()) for name, (_, make) in rows.TENSORS.items())


def weights() -> bytes:
    """Rows that quantisers treat specially, float32: see the page's list."""
    chance = Chance("encode")

    def plain() -> list[float]:
        return chance.uniform(-0.1, 0.1, COLUMNS)

    exponents = [byte % 24 - 12 for byte in chance.take(COLUMNS)]
    made: list[list[float]] = [
        plain(),
        [0.0] * COLUMNS,
        [0.25] * COLUMNS,
        [0.125 if j // 32 % 2 else -0.0625 for j in range(COLUMNS)],
        [-2.0 if j == 37 else 0.0 for j in range(COLUMNS)],
        [abs(x) for x in plain()],
        [-abs(x) for x in plain()],
        [x * 2.0**-20 for x in plain()],
        [x * 2.0**16 for x in plain()],
        [(j % 32 - 16) * 0.5 for j in range(COLUMNS)],
        [x * 2.0**e for x, e in zip(plain(), exponents, strict=True)],
        [x * (32 if j % 17 == 3 else 1) for j, x in enumerate(plain())],
    ]
    return b"".join(f32(*row) for row in made)


def loaded(raw: bytes, dtype: str) -> list[np.float32]:
    """The weights as a model of that dtype has them."""
    numbers = np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return list(numbers.astype(np.float16).astype(np.float32))
    return [encoder.bf16(x) for x in numbers] if dtype == "BF16" else list(numbers)


def files() -> dict[str, bytes]:
    """``encode/NAME.f32`` of the weights, ``encode/NAME.bin`` of the blobs, and ``encode/index.json``.

    The library makes them by its references, of which nothing has to be compiled; ``tests/spec/test_encodings.py`` has
    its kernels make them too.

    Raises:
        AssertionError: uqff makes other bytes than the second implementation.
    """
    inputs = {matrix.name: matrix for matrix in matrices()}
    found = {f"{FOLDER}/{matrix.name}.f32": matrix.raw for matrix in inputs.values()}
    index = []
    with reference_paths():
        for case in cases():
            matrix = inputs[case.matrix]
            numbers = loaded(matrix.raw, case.dtype)
            blob = encoder.encode(numbers, matrix.shape, case.kind, case.dtype, before_0_9=case.old)
            if blob != by_uqff(matrix, case):
                raise AssertionError(f"{FOLDER}/{case.name}: uqff and the encoder disagree")
            found[f"{FOLDER}/{case.name}.bin"] = blob
            index.append(
                {
                    "file": f"{case.name}.bin",
                    "input": f"{case.matrix}.f32",
                    "shape": list(matrix.shape),
                    "kind": case.kind,
                    "load_dtype": case.dtype,
                    "engine": case.engine,
                    "size": len(blob),
                    "sha256": hashlib.sha256(blob).hexdigest(),
                }
            )
    listed = ",\n".join(f" {json.dumps(each)}" for each in index)
    found[f"{FOLDER}/index.json"] = f"[\n{listed}\n]\n".encode()
    return found


@contextmanager
def reference_paths() -> Iterator[None]:
    """Quantise without kernels inside."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def by_uqff(matrix: Matrix, case: Case) -> bytes:
    """The blob as the library makes it."""
    import torch

    import uqff

    numbers = torch.tensor(struct.unpack(f"<{len(matrix.raw) // 4}f", matrix.raw)).reshape(matrix.shape)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[case.dtype]
    record = uqff.quantize(numbers, case.kind, dtype=dtype, engine="0.6" if case.old else "0.9")
    return uqff.serialize(record, version=record.family.since)
