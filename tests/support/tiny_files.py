"""Files put together by hand, byte by byte, for the tests of inspection, verification and the command line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "v0"

HEADER_BYTES = 256
"""Every file made here has its data at this offset."""


def write_file(path: Path, blobs: dict[str, bytes]) -> Path:
    """A safetensors file of blobs, in the order given, whose data begins at :data:`HEADER_BYTES`."""
    header, at = {}, 0
    for key, blob in blobs.items():
        header[key] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [at, at + len(blob)]}
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
    assert len(text) == HEADER_BYTES - 8
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs.values()))
    return path


def unquant(*rows: list[float], bias: list[float] | None = None, version: bytes = b"\0\1\0\0") -> bytes:
    """An Unquant blob: a matrix in F32, 26 bytes in front of it, and a bias, 16 bytes in front of it."""
    numbers = [number for row in rows for number in row]
    blob = version + bytes([1, bias is not None])
    blob += struct.pack("<5I", 4 * len(numbers), 6, 2, len(rows), len(rows[0])) + struct.pack(
        f"<{len(numbers)}f", *numbers
    )
    if bias is not None:
        blob += struct.pack("<4I", 4 * len(bias), 6, 1, len(bias)) + struct.pack(f"<{len(bias)}f", *bias)
    return blob


def q8_0(d: float, codes: list[int]) -> bytes:
    """A GGUF blob: one block of Q8_0 as a matrix of one row, 26 bytes in front of it."""
    data = struct.pack("<e32b", d, *codes)
    return b"\3\1\0\0" + b"\0" + struct.pack("<I", len(data)) + b"\0" + struct.pack("<4I", 8, 2, 1, 32) + data
