"""``uqff_report.json``: read within bounds, compared with the directory, built; a name in it never leads elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.support.samples import BLOBS
from tests.support.samples_v1 import LAYERS, layer, version, write
from uqff import FormatError, ShardError, UnsupportedError, UqffError
from uqff.container import report as report_module
from uqff.container.report import (
    REPORT_NAME,
    build_report,
    check_output,
    check_report,
    read_report,
    report_document,
)
from uqff.container.shards import stays_inside


def document(**changes: Any) -> dict[str, Any]:
    """A sound report of one layer; ``changes`` replace values of its output."""
    output = {
        "quant": "q4_0",
        "shards": ["q4_0-0.uqff"],
        "layers": 1,
        "actual_counts": {"q4_0": 1},
        "fallback_count": 0,
        "layer_details": [{"module": "a", "default_target": "q4_0", "stored": "q4_0", "shape": [2, 32]}],
    }
    return {
        "schema": 1,
        "generated_by": {"tool": "someone"},
        "uqff_version": "1.2.0",
        "outputs": [{**output, **changes}],
    }


def put(folder: Path, content: Any) -> Path:
    """A model directory with one shard, and a report beside it."""
    write(folder / "q4_0-0.uqff", version(), layer("a", LAYERS["gguf"]))
    (folder / REPORT_NAME).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def problems(folder: Path) -> list[tuple[str, str | None]]:
    """Problem and field of all that is wrong with a directory's report."""
    report = read_report(folder)
    assert report is not None
    return [(error.problem, error.field) for error in check_report(report, folder)]


def test_sound_report(tmp_path: Path) -> None:
    """Read, equal when written again, and nothing to complain of."""
    put(tmp_path, document())
    report = read_report(tmp_path)
    assert report is not None
    assert report == read_report(tmp_path / REPORT_NAME)
    assert report_document(report) == document()
    assert problems(tmp_path) == []
    with uqff.open(tmp_path) as file:
        assert list(check_output(report.outputs[0], file)) == []


def test_no_report(tmp_path: Path) -> None:
    """None is needed."""
    assert read_report(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / REPORT_NAME)


@pytest.mark.parametrize(
    "shard",
    [
        "../q4_0-0.uqff",
        "/etc/passwd.uqff",
        "sub/q4_0-0.uqff",
        "..\\q4_0-0.uqff",
        "C:q4_0-0.uqff",
        "./q4_0-0.uqff",
        "..uqff",
        "q4_0-0.uqff/",
        "q4_0-0.uqff\0",
        "config.json",
        "",
        ".",
        "..",
    ],
)
def test_shard_is_a_plain_file_name(tmp_path: Path, shard: str) -> None:
    """A name that leads elsewhere would make a loader read what it should not, even if a file is there."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        write(place / "q4_0-0.uqff", version(), layer("a", LAYERS["gguf"]))
    put(folder, document(shards=[shard]))
    assert problems(folder) == [("shard is not a plain file name", "outputs[0].shards[0]")]


def test_missing_shard(tmp_path: Path) -> None:
    """The engine refuses to load then; long names and broken links are missing, too."""
    put(tmp_path, document(shards=["q4_0-0.uqff", "q4_0-1.uqff"]))
    report = read_report(tmp_path)
    assert report is not None
    (error,) = check_report(report, tmp_path)
    assert isinstance(error, ShardError)
    assert (error.problem, error.field, error.expected) == ("shard is missing", "outputs[0].shards[1]", "q4_0-1.uqff")
    assert error.file == str(tmp_path / REPORT_NAME)
    (tmp_path / "q4_0-1.uqff").symlink_to(tmp_path / "gone")
    assert problems(tmp_path) == [("shard is missing", "outputs[0].shards[1]")]
    put(tmp_path, document(shards=["q" * 5000 + ".uqff"]))
    assert problems(tmp_path) == [("shard cannot be looked up", "outputs[0].shards[0]")]


def test_links(tmp_path: Path) -> None:
    """To a sibling, or into the blob store of a hub cache; nowhere else."""
    snapshot, blobs, elsewhere = tmp_path / "hub" / "snapshots" / "c0", tmp_path / "hub" / "blobs", tmp_path / "other"
    shared = tmp_path / "blobs" / "01"  # of several repositories of the cache
    for folder in (snapshot, blobs, elsewhere, shared):
        folder.mkdir(parents=True)
    put(snapshot, document())
    shard = snapshot / "q4_0-0.uqff"
    for target, expected in (
        (blobs / "0123", []),
        (shared / "0123", []),
        (snapshot / "real.uqff", []),
        (elsewhere / "x.uqff", [("shard is a link out of the directory", "outputs[0].shards[0]")]),
    ):
        os.replace(shard, target) if not shard.is_symlink() else os.replace(shard.resolve(), target)
        shard.unlink(missing_ok=True)
        shard.symlink_to(target)
        assert problems(snapshot) == expected
    inner = snapshot / "folder" / "in" / "it"
    inner.mkdir(parents=True)
    (blobs / "4567").touch()
    (inner / "x.uqff").symlink_to(blobs / "4567")
    assert stays_inside(inner / "x.uqff")
    shard.unlink()
    shard.mkdir()
    assert problems(snapshot) == [("shard is not a regular file", "outputs[0].shards[0]")]


@pytest.mark.parametrize(
    ("changes", "problem", "field"),
    [
        ({"quant": " "}, "output needs a name of its own", "outputs[0].quant"),
        ({"shards": []}, "output without shards", "outputs[0].shards"),
        ({"shards": ["q4_0-0.uqff"] * 2}, "shard is named twice", "outputs[0].shards[1]"),
        ({"layers": 2}, "counts do not add up", "outputs[0].actual_counts"),
        ({"layers": 0, "actual_counts": {}, "layer_details": []}, "counts do not add up", "outputs[0].actual_counts"),
        ({"fallback_count": 1}, "wrong count", "outputs[0].fallback_count"),
        ({"actual_counts": {"q8_0": 1}}, "counts do not fit the layers", "outputs[0].actual_counts"),
    ],
)
def test_report_agrees_with_itself(tmp_path: Path, changes: dict[str, Any], problem: str, field: str) -> None:
    """One broken rule each."""
    assert problems(put(tmp_path, document(**changes))) == [(problem, field)]


def test_outputs(tmp_path: Path) -> None:
    """There is one at least, their names differ, and no two have a shard in common."""
    assert problems(put(tmp_path, document() | {"outputs": []})) == [("report without outputs", "outputs")]
    twice = document()
    twice["outputs"] *= 2
    assert problems(put(tmp_path, twice)) == [
        ("output needs a name of its own", "outputs[1].quant"),
        ("shard is named twice", "outputs[1].shards[0]"),
    ]


@pytest.mark.parametrize(
    ("content", "error", "field"),
    [
        (b"", FormatError, None),
        (b"{", FormatError, None),
        (b"\xff", FormatError, None),
        (b"[" * 100_000, FormatError, None),
        (b'{"schema":1,"schema":1}', FormatError, "schema"),
        (b'{"schema":' + b"9" * 5000 + b"}", FormatError, None),
        (b'{"schema":"\\ud800"}', FormatError, None),
        (b"[]", FormatError, "report"),
        (b"{}", FormatError, "schema"),
        (b'{"schema":true}', FormatError, "schema"),
        (b'{"schema":1.0}', FormatError, "schema"),
        (b'{"schema":-1}', FormatError, "schema"),
        (b'{"schema":2}', UnsupportedError, "schema"),
        (b'{"schema":1}', FormatError, "generated_by"),
        (document() | {"generated_by": {}}, FormatError, "generated_by.tool"),
        (document() | {"generated_by": {"tool": "x", "n": 1}}, FormatError, "generated_by.n"),
        (document() | {"uqff_version": 1}, FormatError, "uqff_version"),
        (document() | {"base_model": []}, FormatError, "base_model"),
        (document() | {"outputs": {}}, FormatError, "outputs"),
        (document() | {"outputs": [1]}, FormatError, "outputs[0]"),
        (document(shards="a"), FormatError, "outputs[0].shards"),
        (document(shards=[1]), FormatError, "outputs[0].shards[0]"),
        (document(layers=2**32), FormatError, "outputs[0].layers"),
        (document(actual_counts=[1]), FormatError, "outputs[0].actual_counts"),
        (document(actual_counts={"q": "1"}), FormatError, "outputs[0].actual_counts.q"),
        (document(fallbacks=[{}]), FormatError, "outputs[0].fallbacks[0].module"),
        (
            document(layer_details=[{"module": "a", "stored": "b", "shape": [1] * 9}]),
            FormatError,
            "outputs[0].layer_details[0].shape",
        ),
        (
            document(layer_details=[{"module": "a", "stored": "b", "shape": [True]}]),
            FormatError,
            "outputs[0].layer_details[0].shape[0]",
        ),
    ],
)
def test_what_is_no_report(tmp_path: Path, content: Any, error: type[UqffError], field: str | None) -> None:
    """The file and the path of the value are named."""
    put(tmp_path, content)
    with pytest.raises(UqffError) as caught:
        read_report(tmp_path)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert caught.value.file == str(tmp_path / REPORT_NAME)
    assert str(caught.value).isprintable()


def test_unknown_values_are_ignored(tmp_path: Path) -> None:
    """A later engine may say more."""
    report = document(future=[1])
    report["future"] = {"x": None}
    assert read_report(put(tmp_path, report)) == read_report(put(tmp_path, document()))


def test_length_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is parsed whole."""
    content = json.dumps(document()).encode()
    put(tmp_path, content)
    monkeypatch.setattr(report_module, "MAX_REPORT_BYTES", len(content))
    assert read_report(tmp_path) is not None
    monkeypatch.setattr(report_module, "MAX_REPORT_BYTES", len(content) - 1)
    with pytest.raises(FormatError, match="report is too long"):
        read_report(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_report_is_a_file(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / REPORT_NAME)
    with pytest.raises(FormatError, match="not a regular file"):
        read_report(tmp_path)


def test_report_that_differs_from_the_file(tmp_path: Path) -> None:
    """Each difference is named."""
    layers = [
        {"module": "a", "stored": "q4_0", "shape": [2, 64]},
        {"module": "z", "stored": "q4_0", "shape": [2, 32]},
    ]
    other = document(shards=["x.uqff"], layers=2, actual_counts={"q4_0": 2}, layer_details=layers)
    report = read_report(put(tmp_path, other))
    assert report is not None
    with uqff.open(tmp_path) as file:
        found = [(error.problem, error.layer) for error in check_output(report.outputs[0], file)]
    assert found == [
        ("other shards", None),
        ("wrong count", None),
        ("wrong counts", None),
        ("layer is not as reported", "a"),
        ("no such layer in the file", "z"),
    ]


def test_build(tmp_path: Path) -> None:
    """Counts, shapes as stored, a plain layer is a fallback; what is built passes the checks."""
    made = {name: uqff.deserialize(BLOBS[name]) for name in ("gguf", "afq", "unquant", "gguf-f32")}
    uqff.save(made, tmp_path / "afq2.uqff", version=(1, 1, 0))
    with uqff.open(tmp_path) as file:
        report = build_report({"afq2": file}, targets={"afq2": {"gguf": "q4_0"}}, base_model="org/model")
        assert list(check_output(report.outputs[0], file)) == []
        with pytest.raises(FormatError, match="no files"):
            build_report({})
    assert list(check_report(report, tmp_path)) == []
    (tmp_path / REPORT_NAME).write_text(json.dumps(report_document(report)))
    assert read_report(tmp_path) == report
    output = report_document(report)["outputs"][0]
    assert report.uqff_version == "1.1.0"
    assert output["actual_counts"] == {"afq2": 1, "f32": 1, "q4_0": 1, "unquant": 1}
    assert [(f["module"], f["from"], f["to"], f["shape"]) for f in output["fallbacks"]] == [
        ("gguf-f32", "afq2", "f32", [2, 2]),
        ("unquant", "afq2", "unquant", [2, 3]),
    ]
    assert [layer["shape"] for layer in output["layer_details"]] == [[2, 2], [2, 32], [2, 2], [2, 3]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**33) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    path=st.sampled_from(["schema", "generated_by", "outputs", "quant", "shards", "layers", "layer_details"]),
    value=json_values,
)
def test_any_value_anywhere(tmp_path_factory: pytest.TempPathFactory, path: str, value: Any) -> None:
    """A report, or a UqffError; what is read is checked without any other error."""
    folder = tmp_path_factory.getbasetemp() / "any-value"
    folder.mkdir(exist_ok=True)
    changed = document(**{path: value}) if path in document()["outputs"][0] else document() | {path: value}
    put(folder, changed)
    try:
        report = read_report(folder)
    except UqffError:
        return
    assert report is not None
    assert all(isinstance(error, UqffError) for error in check_report(report, folder))
