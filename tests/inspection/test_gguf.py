"""What ``uqff inspect`` shows of a GGUF file: every value of its head, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import call
from tests.support.samples_gguf import F32, Q8_0, SOUND, Tensor, array, gguf, pair
from uqff.errors import FormatError, UnsupportedError
from uqff.inspection.gguf import ListedArray, TensorRow, gguf_meant, inspect_gguf
from uqff.inspection.summary import FileRow, TypeRow


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    (tmp_path / "m.gguf").write_bytes(SOUND)
    return tmp_path / "m.gguf"


def test_a_file_at_a_glance(sound: Path) -> None:
    """Version, metadata of every type, tensors with their places, types by weights."""
    summary = inspect_gguf(sound)
    assert summary.files == (FileRow(str(sound), len(SOUND), 2),)
    begin = len(SOUND) - 96 - 12
    assert summary.tensors == (
        TensorRow("q", "Q8_0", (2, 32), str(sound), begin, 68),
        TensorRow("f", "F32", (3,), str(sound), begin + 96, 12),
    )
    assert summary.types == [TypeRow("Q8_0", 1, 64, 68), TypeRow("F32", 1, 3, 12)]
    assert (summary.version, summary.weights, summary.payload_bytes) == (3, 67, 80)
    assert summary.metadata["u64"] == 2**64 - 1
    assert summary.metadata["true"] is True
    assert summary.metadata["texts"] == ListedArray("text", 3, ("a", "", "bc"))
    assert summary.metadata["none"] == ListedArray("u8", 0, ())


def test_the_command(sound: Path) -> None:
    """Facts, metadata, a line for each tensor; as JSON, the same."""
    code, output, errors = call("inspect", sound)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[:4] == [str(sound), "  format            GGUF 3", "  files             1", "  tensors           2"]
    assert "  metadata f32      9.99999975e-06" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["tensor", "type", "shape", "weights", "bytes", "offset"],
        ["q", "Q8_0", "[2,", "32]", "64", "68", str(len(SOUND) - 108)],
        ["f", "F32", "[3]", "3", "12", str(len(SOUND) - 12)],
    ]
    document = json.loads(call("inspect", sound, "--json")[1])
    assert (document["schema"], document["generation"], document["version"]) == (1, "gguf", 3)
    assert document["totals"] == {
        "tensors": 2,
        "bytes": len(SOUND),
        "weights": 67,
        "payload_bytes": 80,
        "bits_per_weight": 640 / 67,
    }
    assert document["tensors"][1] == {
        "name": "f",
        "type": "F32",
        "shape": [3],
        "weights": 3,
        "file": str(sound),
        "offset": len(SOUND) - 12,
        "bytes": 12,
    }
    assert document["metadata"]["numbers"] == {"type": "i32", "count": 2, "first": [1, -2]}
    assert document["files"] == [{"path": str(sound), "bytes": len(SOUND), "tensors": 2}]
    for wrong in (["q"], ["--html", "page.html"]):
        code, _, errors = call("inspect", sound, *wrong)
        assert (code, "of a GGUF file, tensors are listed" in errors) == (2, True)


def test_what_is_cut(tmp_path: Path) -> None:
    """Long texts and arrays in the table, arrays in JSON; control characters are escaped; types that are not read."""
    pairs = [pair("general.name", "text", "x" * 100), array("tokens", "text", [f"t{n}" for n in range(1000)])]
    pairs.append(pair("odd", "text", "a\x1b[31m"))
    odd = Tensor("odd", (4,), 36, b"")  # a type that ggml has removed
    (tmp_path / "m.gguf").write_bytes(gguf(pairs, [F32, odd]))
    lines = call("inspect", tmp_path / "m.gguf")[1].splitlines()
    assert f"  metadata general.name  {'x' * 80}... (100 characters)" in lines
    assert "  metadata tokens        1,000 text: [t0, t1, t2, t3, t4, t5, t6, t7, ...]" in lines
    assert "  metadata odd           a\\x1b[31m" in lines
    assert lines[-1].split()[-2] == "-"
    document = json.loads(call("inspect", tmp_path / "m.gguf", "--json")[1])
    assert document["metadata"]["general.name"] == "x" * 100
    assert len(document["metadata"]["tokens"]["first"]) == 8
    assert document["tensors"][1]["bytes"] is None
    assert document["totals"]["weights"] == 3


def test_files_of_a_set(tmp_path: Path) -> None:
    """All are one, whichever is named."""
    for at, tensor in enumerate((Q8_0, F32)):
        split = [("split.no", "u16", at), ("split.count", "u16", 2), ("split.tensors.count", "i32", 2)]
        path = tmp_path / f"m-{at + 1:05}-of-00002.gguf"
        path.write_bytes(gguf([pair(*each) for each in split], [tensor]))
    summary = inspect_gguf(tmp_path / "m-00002-of-00002.gguf")
    assert [(file.path, file.layers) for file in summary.files] == [
        (str(tmp_path / f"m-0000{at}-of-00002.gguf"), 1) for at in (1, 2)
    ]
    assert [row.path for row in summary.tensors] == [file.path for file in summary.files]
    assert call("inspect", tmp_path / "m-00001-of-00002.gguf")[1].splitlines()[-1].endswith("m-00002-of-00002.gguf")


def test_broken_files(tmp_path: Path) -> None:
    """One typed error, and exit code 1; what is no GGUF file is looked at as UQFF."""
    path = tmp_path / "m.gguf"
    for end in range(4, len(SOUND) - 108, 7):
        path.write_bytes(SOUND[:end])
        with pytest.raises((FormatError, UnsupportedError)):
            inspect_gguf(path)
    code, output, errors = call("inspect", path)
    assert (code, output, str(path) in errors) == (1, "", True)
    bad = array("tokens", "text", ["ab"]).replace(b"ab", b"\xff\xff")
    path.write_bytes(gguf([bad], [F32]))
    with pytest.raises(FormatError, match="UTF-8"):
        inspect_gguf(path)
    (tmp_path / "m.uqff").write_bytes(b"")
    assert gguf_meant(tmp_path / "m.uqff") is None
    with pytest.raises(UnsupportedError, match="no GGUF file"):
        inspect_gguf(tmp_path / "m.uqff")
