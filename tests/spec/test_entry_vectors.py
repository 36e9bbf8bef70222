"""The 1.x vectors of the spec against this implementation: every entry, every weight, every byte, every error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import uqff
from tests.codec.test_entries import plain
from tests.spec.test_vectors import KINDS, float32
from uqff.codec.entries import from_entries, suffixes, to_entries
from uqff.codes import ENTRY_VERSIONS
from uqff.inspection.verify import verify
from uqff.schema.entries import RawTensor

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
GOOD_FOLDER, BAD_FOLDER = VECTORS / "entries", VECTORS / "bad-entries"
GOOD: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text("utf-8")) for path in sorted(GOOD_FOLDER.glob("*.json"))
}
BAD: list[dict[str, Any]] = json.loads((BAD_FOLDER / "index.json").read_text("utf-8"))
SMALL = ["gguf-v1.0", "unquant-v1.1", "hqq-v1.0", "fp8-v1.0", "afq-v1.1", "f8q8-v1.1", "mxfp4-v1.1"]
"""One vector a family, to be cut and changed everywhere."""


def opened(description: dict[str, Any]) -> uqff.UqffFile:
    """A vector as a model; a set by its first file."""
    paths = [GOOD_FOLDER / file["file"] for file in description["files"]]
    return uqff.open(paths if len(paths) == 1 else paths[0])


def test_vectors_cover_every_family_version_and_type() -> None:
    """A type without a vector would be a type without a specification."""
    assert {layer["kind"] for vector in GOOD.values() for layer in vector["layers"]} == KINDS
    seen = {(layer["family"], vector["version"][:3]) for vector in GOOD.values() for layer in vector["layers"]}
    families = {family.title for family in uqff.Family}
    assert seen == {(family, f"1.{minor}") for family in families for minor in range(3)} - {("Unquant", "1.0")}
    assert {len(vector["files"]) for vector in GOOD.values()} == {1, 2, 3}
    assert len(BAD) >= 100


@pytest.mark.parametrize("name", GOOD)
def test_entries(name: str) -> None:
    """Every entry lies where the description says, and every layer has those that it says; nothing is left over."""
    vector = GOOD[name]
    shards = [(GOOD_FOLDER / file["file"]).read_bytes() for file in vector["files"]]
    for file, data in zip(vector["files"], shards, strict=True):
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])
    described = {entry["name"]: entry for entry in vector["entries"]}
    with opened(vector) as model:
        assert model.generation == "1.x"
        assert str(model.version) == vector["version"]
        assert model.metadata == vector["metadata"]
        assert [path.name for path in model.paths] == [file["file"] for file in vector["files"]]
        assert list(model) == [layer["key"] for layer in vector["layers"]]
        assert sorted(model.extra) == vector["extra"]
        owned = {}
        for layer in vector["layers"]:
            places, entries = model.places(layer["key"]), model.entries(layer["key"])
            assert sorted(places) == layer["suffixes"]
            for suffix, place in places.items():
                entry = described[f"{layer['key']}.{suffix}"]
                owned[entry["name"]] = entry
                start, size = entry["offset"], entry["size"]
                assert place == (model.paths[entry["file"]], start, size)
                assert (entries[suffix].dtype, list(entries[suffix].shape)) == (entry["dtype"], entry["shape"])
                assert bytes(entries[suffix].data) == shards[entry["file"]][start : start + size]
        assert {*owned, *vector["extra"]} == {key for key in described if not key.startswith("uqff.version.")}


@pytest.mark.parametrize("name", GOOD)
def test_numbers(name: str) -> None:
    """The numbers and shapes that the fields of a layer have are those of the description."""
    vector = GOOD[name]
    with opened(vector) as model:
        values: dict[str, Any] = {}
        for key in model:
            trace: list[Any] = []
            model.fields(key, trace=trace)
            values |= {f"{key}.{field.path}": field.value for field in trace}
    for entry in vector["entries"]:
        if "value" in entry and entry["name"] in values:
            value = values[entry["name"]]
            got = getattr(value, "code", value)
            assert (list(got) if isinstance(got, tuple) else got or 0) == entry["value"], entry["name"]


@pytest.mark.parametrize("name", GOOD)
def test_weights(name: str) -> None:
    """Every dequantised weight and every bias is the stated float32, bit for bit."""
    vector = GOOD[name]
    with opened(vector) as model:
        for described in vector["layers"]:
            weight, bias = model[described["key"]]
            assert (weight.family.title, weight.kind) == (described["family"], described["kind"])
            assert list(weight.shape) == described["shape"]
            expected, values = described["float32"], float32(weight.dequantize())
            assert hashlib.sha256(values).hexdigest() == expected["sha256"]
            assert values.hex() == expected.get("hex", values.hex())
            assert (bias is None) == (described["bias"] is None)
            if bias is not None:
                assert list(bias.shape) == described["bias"]["shape"]
                assert float32(bias).hex() == described["bias"]["float32"]


@pytest.mark.parametrize("name", [name for name, vector in GOOD.items() if vector["layers"]])
def test_saved_again(name: str, tmp_path: Path) -> None:
    """What was read is written with the same entries; in one shard, as the very bytes behind the header's metadata."""
    vector = GOOD[name]
    version = next(v for v in ENTRY_VERSIONS if str(v).startswith(vector["version"][:3]))
    with opened(vector) as model:
        (path,) = uqff.save(model, tmp_path / "m.uqff", version=version)
        with uqff.open(path) as again:
            assert list(again) == list(model)
            for key in model:
                assert plain(again.entries(key)) == plain(model.entries(key))
        canonical = len(model.paths) == 1 and not vector["extra"] and vector["version"].endswith(".0")
        if canonical and name not in ("order-is-free", "white-space"):
            assert stripped(path) == stripped(model.paths[0])


def stripped(path: Path) -> tuple[list[tuple[str, Any]], bytes]:
    """The header in its order, less metadata, and the data."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return list(header.items()), data[begin:]


@pytest.mark.parametrize("name", GOOD)
def test_sound_vectors_are_clean(name: str) -> None:
    """No rule about payloads is broken either; the vectors called edge have extreme scales, and no NaN."""
    path = GOOD_FOLDER / GOOD[name]["files"][0]["file"]
    found = list(verify(path if len(GOOD[name]["files"]) > 1 else [path]))
    assert found == []


@pytest.mark.parametrize("name", SMALL)
def test_every_truncation_is_refused(name: str, tmp_path: Path) -> None:
    """A download that stopped is never half a model."""
    data = (GOOD_FOLDER / f"{name}.uqff").read_bytes()
    path = tmp_path / "x.uqff"
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(uqff.FormatError) as caught:
            uqff.open([path])
        assert caught.value.file == str(path)


def refused_by(entries: dict[str, RawTensor], version: uqff.Version) -> str | None:
    """The entry that a reader blames; None if it reads the entries as what they are.

    Raises:
        AssertionError: they are read as something else.
        Exception: whatever is not a UqffError.
    """
    try:
        layer = from_entries(entries, version)
    except uqff.UqffError as error:
        return str(error.field)
    assert plain(to_entries(layer, version)) == plain(entries)
    return None


@pytest.mark.parametrize("name", SMALL)
def test_every_value_of_every_number(name: str) -> None:
    """No value of a code, count, flag or dimension makes a reader crash, or read what is not there."""
    vector = GOOD[name]
    with opened(vector) as model:
        (key,) = model
        entries, version = model.entries(key), model.version
    faithful = tried = 0
    for suffix, (dtype, shape, data) in entries.items():
        if data.nbytes > 12 or suffix == "bias":
            continue
        for at in range(data.nbytes):
            tried += 1
            changed = bytearray(data)
            for value in range(256):
                changed[at] = value
                blamed = refused_by({**entries, suffix: RawTensor(dtype, shape, memoryview(bytes(changed)))}, version)
                assert blamed is None or blamed in suffixes()
                faithful += blamed is None
    assert faithful >= tried  # the original value, at least


def read_all(path: Path) -> None:
    """Open a model and read every layer."""
    with uqff.open(path) as file:
        for key in file:
            file[key]


@pytest.mark.parametrize("entry", BAD, ids=lambda entry: entry["files"][0])
def test_broken(entry: dict[str, Any]) -> None:
    """Each broken file is refused with the stated class, file, field and offset; verify finds it, too."""
    path = BAD_FOLDER / entry["files"][0]
    with pytest.raises(uqff.UqffError) as caught:
        read_all(path)
    error = caught.value
    assert type(error).__name__ == entry["error"]
    assert (error.field, error.offset, error.problem) == (entry["field"], entry["offset"], entry["problem"])
    assert error.file == str(BAD_FOLDER / entry["file"])
    (violation,) = verify(path)
    assert (violation.field, violation.offset, violation.problem) == (error.field, error.offset, error.problem)


def test_near_misses_exist_and_every_broken_file_is_in_the_index() -> None:
    """A file beside the index would be checked by nobody; a near miss that does not parse would be none."""
    assert {entry["near_miss"] for entry in BAD} <= set(GOOD)
    present = {path.name for path in BAD_FOLDER.glob("*.uqff")}
    assert present == {name for entry in BAD for name in entry["files"]}
    assert {path.name for path in GOOD_FOLDER.glob("*.uqff")} == {f["file"] for v in GOOD.values() for f in v["files"]}
