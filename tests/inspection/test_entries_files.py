"""verify, inspect and diff on 1.x files: the same findings as for 0.x, placed in the entry they are about."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import uqff
from tests.support.samples_v1 import BIAS, LAYERS, byte, layer, version, write
from uqff import UnsupportedError
from uqff.cli import main
from uqff.container.report import REPORT_NAME
from uqff.inspection.compare import compare
from uqff.inspection.layer import report_layer
from uqff.inspection.summary import summarize
from uqff.inspection.verify import verify

TESTS = Path(__file__).resolve().parents[1]

GOLDEN = TESTS / "golden" / "v1"
NAN = struct.pack("<f", float("nan"))


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.uqff")), ids=lambda p: p.relative_to(GOLDEN).as_posix())
def test_client_files_are_clean(path: Path) -> None:
    """What the real clients wrote breaks no rule."""
    assert list(verify(path)) == []


@pytest.mark.parametrize(
    ("name", "suffix", "index"),
    [
        ("hqq", "weight.scales", 1),
        ("hqq", "weight.zeros", 0),
        ("afq", "weight.biases", 1),
        ("fp8", "weight.quant_scale", 0),
        ("hqq", "bias", 1),
    ],
)
def test_payload_problem_is_placed_in_its_entry(tmp_path: Path, name: str, suffix: str, index: int) -> None:
    """File, layer, entry and the offset of the element."""
    entries = {**LAYERS[name], "bias": BIAS}
    dtype, shape, data = entries[suffix]
    entries[suffix] = (dtype, shape, data[: 4 * index] + NAN + data[4 * index + 4 :])
    path = write(tmp_path / "m.uqff", version(), layer("x", entries), layer("good", LAYERS["gguf"]))
    (found,) = verify(path)
    assert (found.file, found.layer, found.field) == (str(path), "x", suffix)
    assert found.offset is not None
    assert path.read_bytes()[found.offset : found.offset + 4] == NAN


def test_every_broken_layer_is_found(tmp_path: Path) -> None:
    """One violation each, and the report beside the file is compared, too."""
    broken = {**LAYERS["afq"], "weight.bits": byte(5)}
    path = write(tmp_path / "m.uqff", version(), layer("a", broken), layer("b", LAYERS["gguf"]), layer("c", broken))
    assert [(v.layer, v.field, v.problem) for v in verify(path)] == [
        ("a", "weight.bits", "value out of range"),
        ("c", "weight.bits", "value out of range"),
    ]
    output = {"quant": "q", "shards": ["gone.uqff"], "layers": 1, "actual_counts": {"q": 1}, "fallback_count": 0}
    report = {"schema": 1, "generated_by": {"tool": "x"}, "uqff_version": "1.2.0", "outputs": [output]}
    write(path, version(), layer("b", LAYERS["gguf"]))
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    assert [v.problem for v in verify(path)] == ["shard is missing"]
    output["shards"] = ["m.uqff"]
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    assert [v.problem for v in verify(path)] == ["wrong counts"]
    (tmp_path / REPORT_NAME).write_text("{")
    assert [v.problem for v in verify(path)] == ["report is not JSON"]


def test_summary(tmp_path: Path) -> None:
    """Types, sizes, no indices."""
    path = write(tmp_path / "m.uqff", version(1, 1), *(layer(name, LAYERS[name]) for name in LAYERS))
    with uqff.open(path) as file:
        summary = summarize(file)
    assert (summary.generation, [str(v) for v in summary.versions]) == ("1.x", ["1.1.0"])
    assert {row.key: row.index for row in summary.layers} == dict.fromkeys(sorted(LAYERS))
    assert sum(row.nbytes for row in summary.layers) == sum(len(t[2]) for e in LAYERS.values() for t in e.values())
    assert {row.kind for row in summary.types} == {"q4_0", "unquant", "hqq4", "fp8", "afq2", "f8q8", "mxfp4"}


def test_layer_in_full(tmp_path: Path) -> None:
    """Every entry is a field with its place in the file, bytes and value; the dump has every byte."""
    path = write(tmp_path / "m.uqff", version(), layer("x", {**LAYERS["hqq"], "bias": BIAS}))
    data = path.read_bytes()
    with uqff.open(path) as file:
        report = report_layer(file, "x", dump=True, limit=0)
    fields = {field.path: field for field in report.fields}
    assert set(fields) == {*LAYERS["hqq"], "bias"}
    for suffix, field in fields.items():
        expected = LAYERS["hqq"].get(suffix, BIAS)[2]
        assert data[field.offset : field.offset + field.nbytes] == expected == field.raw
    assert fields["weight.scales"].preview == [1, 2]
    assert (fields["weight.bits"].value, fields["weight.shape"].value) == (4, (2, 4))
    assert report.hexdump is not None
    assert all(data[line.offset : line.offset + len(line.data)] == line.data for line in report.hexdump)
    assert sum(len(line.data) for line in report.hexdump) == sum(field.nbytes for field in report.fields)
    assert report.statistics is not None


def test_commands(tmp_path: Path) -> None:
    """By path of the weight or its place; both commands end well."""
    path = write(tmp_path / "m.uqff", version(), layer("model.layers.0.x", LAYERS["gguf"]))
    runner = CliRunner()
    for arguments in (["inspect", str(path)], ["inspect", str(path), "model.layers.0.x"], ["verify", str(path)]):
        result = runner.invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert "model.layers.0.x" in runner.invoke(main, ["inspect", str(path)]).output
    assert runner.invoke(main, ["inspect", str(path), "1"]).exit_code == 2


def test_diff(tmp_path: Path) -> None:
    """Layers are matched by path; between generations, config.json has to tell the paths of 0.x layers."""
    one = write(tmp_path / "a.uqff", version(), layer("x", LAYERS["gguf"]), layer("y", LAYERS["afq"]))
    two = write(tmp_path / "b.uqff", version(1, 0), layer("y", LAYERS["afq"]), layer("x", LAYERS["gguf"]))
    found = list(compare(one, two))
    assert [(d.key, d.identical) for d in found] == [("x", True), ("y", True)]
    uqff.save({0: uqff.Layer(uqff.open(one)["x"].weight)}, tmp_path / "c.uqff")
    with pytest.raises(UnsupportedError, match=r"layers of 0\.x have no names"):
        list(compare(one, tmp_path / "c.uqff"))


def test_outputs_that_share_a_shard_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of a thousand outputs over one file must not make it be read a thousand times."""
    write(tmp_path / "m-0.uqff", version(), layer("a", LAYERS["gguf"]))
    output = {
        "quant": "q4_0",
        "shards": ["m-0.uqff"],
        "layers": 1,
        "actual_counts": {"q4_0": 1},
        "fallback_count": 0,
    }
    outputs = [{**output, "quant": f"q{n}"} for n in range(1000)]
    report = {"schema": 1, "generated_by": {"tool": "t"}, "uqff_version": "1.2.0", "outputs": outputs}
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    compared: list[str] = []

    def counted(output: Any, file: Any) -> Iterator[Any]:
        compared.append(output.quant)
        return iter(())

    monkeypatch.setattr("uqff.inspection.verify.check_output", counted)
    assert {violation.problem for violation in verify(tmp_path)} == {"shard is named twice"}
    assert compared == ["q0"]


def test_a_violation_shows_as_much_of_a_name_as_fits(tmp_path: Path) -> None:
    """A name of sixty thousand letters is no line of that length."""
    name = "e" * 60_000
    (found,) = verify(write(tmp_path / "m.uqff", version(), {f"{name}.weight.scales": byte(1)}))
    assert found.layer == name
    assert len(str(found)) < 1000
