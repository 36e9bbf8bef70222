"""uqff.inspection.summary and meta: what a model is, without its payload."""

from __future__ import annotations

from pathlib import Path

import pytest

import uqff
from tests.support.tiny_files import GOLDEN, HEADER_BYTES, q8_0, unquant, write_file
from uqff.inspection import read_meta, summarize

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.uqff"))
TWO_ROWS = unquant([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


@pytest.mark.parametrize("name", FILES)
def test_meta_says_what_the_record_says(name: str) -> None:
    """Kind, shape, stored bytes and bias are read off the fields; the record, made with torch, must agree."""
    with uqff.open([GOLDEN / name]) as file:
        for key, layer in file.items():
            meta = read_meta(file, key)
            weight = layer.weight
            assert (meta.kind, meta.shape) == (weight.kind, weight.shape)
            assert (meta.payload_bytes, meta.weights) == (weight.nbytes, weight.numel)
            bias = None if layer.bias is None else (uqff.DType.of_torch(layer.bias.dtype), tuple(layer.bias.shape))
            assert meta.bias == bias


def test_summary_of_a_client_file() -> None:
    """Totals of a complete directory that mixes three families."""
    with uqff.open(GOLDEN / "llama-mixed-f32") as file:
        summary = summarize(file)
    assert summary.generation == "0.x"
    assert summary.versions == [(0, 1, 3)]
    assert [(f.path, f.nbytes, f.layers) for f in summary.files] == [
        (str(GOLDEN / "llama-mixed-f32" / "q8_0-0.uqff"), 176_508, 15)
    ]
    assert [(t.kind, t.layers, t.weights, t.payload_bytes, t.bits_per_weight) for t in summary.types] == [
        ("afq4", 7, 36_864, 23_040, 5.0),
        ("unquant", 7, 36_864, 147_456, 32.0),
        ("q8_0", 1, 4_096, 4_352, 8.5),
    ]
    assert (summary.weights, summary.payload_bytes) == (77_824, 174_848)
    assert summary.bits_per_weight == 8 * 174_848 / 77_824
    assert [row.index for row in summary.layers] == list(range(15))
    assert summary.residual is not None
    assert (summary.residual.tensors, summary.residual.nbytes) == (6, 18_248)
    assert summary.broken == []


def test_a_broken_layer_is_a_row_with_an_error(tmp_path: Path) -> None:
    """The other layers are still there, and totals are theirs alone."""
    broken = TWO_ROWS[:10] + b"\x63" + TWO_ROWS[11:]
    path = write_file(tmp_path / "m.uqff", {"0": broken, "1": q8_0(1.0, [0] * 32)})
    with uqff.open(path) as file:
        summary = summarize(file)
    first, second = summary.layers
    assert (first.meta, first.bits_per_weight) == (None, None)
    assert isinstance(first.error, uqff.FormatError)
    assert (first.error.layer, first.error.field, first.error.offset) == ("0", "weight.dtype", HEADER_BYTES + 10)
    assert second.error is None
    assert second.meta is not None
    assert second.meta.kind == "q8_0"
    assert [row.key for row in summary.broken] == ["0"]
    assert (summary.weights, summary.payload_bytes) == (32, 34)


def test_a_bias_that_does_not_fit_breaks_its_layer(tmp_path: Path) -> None:
    """The check that reading does with tensors is done without them, at the same offset."""
    path = write_file(tmp_path / "m.uqff", {"0": unquant([1.0], [2.0], bias=[1.0, 2.0, 3.0])})
    with uqff.open(path) as file:
        (row,) = summarize(file).layers
        with pytest.raises(uqff.ShapeError) as read:
            file["0"]
    assert isinstance(row.error, uqff.ShapeError)
    assert str(row.error) == str(read.value)
    assert row.error.offset == HEADER_BYTES + 26 + 8 + 12


def test_no_layers_no_bits(tmp_path: Path) -> None:
    """A file without layers has no bits per weight, rather than a division by zero."""
    with uqff.open(write_file(tmp_path / "m.uqff", {})) as file:
        summary = summarize(file)
    assert (summary.layers, summary.bits_per_weight, summary.types, summary.versions) == ((), None, [], [])


def test_a_broken_residual_is_told(tmp_path: Path) -> None:
    """The summary does not end because of the file beside it."""
    path = write_file(tmp_path / "m.uqff", {"0": TWO_ROWS})
    (tmp_path / "residual.safetensors").write_bytes(b"GGUF" + bytes(20))
    with uqff.open(path) as file:
        residual = summarize(file).residual
    assert residual is not None
    assert (residual.nbytes, residual.tensors) == (24, 0)
    assert residual.error is not None
    assert (
        residual.error.problem
        == "not a UQFF file: a GGUF file, which uqff inspect, plan, convert, quantize and run take"
    )
