"""``uqff.open``: the mapping, the errors' places, laziness, lifetimes."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import uqff
from tests.support.samples import BLOB, BLOBS, entry, file_of, framed, header, run, write
from uqff import FormatError, Layer, MissingError, UqffError, UqffFile, Version
from uqff.container.file import Place
from uqff.schema.bricks import FieldTrace

MIXED = {str(index): blob for index, blob in enumerate(BLOBS.values())}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with a layer of every family."""
    return write(tmp_path / "model.uqff", MIXED)


# ---------------------------------------------------------------------------------------------------------------------
# The mapping
# ---------------------------------------------------------------------------------------------------------------------


def test_mapping(model: Path) -> None:
    """Keys in index order, layers equal to those of the bare blobs, the usual methods."""
    with uqff.open(model) as file:
        assert isinstance(file, UqffFile)
        assert list(file) == [str(n) for n in range(len(MIXED))]
        assert len(file) == len(MIXED)
        assert list(file.keys()) == list(MIXED)
        for (key, layer), blob in zip(file.items(), MIXED.values(), strict=True):
            assert layer == uqff.deserialize(blob)
            assert file[int(key)] == layer
            assert bytes(file.blob(key)) == blob
            assert file.blob(int(key)) == file.blob(key)
        assert list(file.values()) == [uqff.deserialize(blob) for blob in MIXED.values()]
        assert repr(file) == f"<UqffFile model.uqff: {len(MIXED)} layers>"


def test_keys(tmp_path: Path) -> None:
    """Texts as they are in the file, ints by index; everything else is no key."""
    with uqff.open(write(tmp_path / "m.uqff", {"3": BLOB, "01": BLOBS["gguf"], "10": BLOB})) as file:
        assert list(file) == ["01", "3", "10"]
        assert "01" in file
        first: Any = 1
        assert first in file
        assert file[1] == file["01"]
        missing: Any
        for missing in ("1", "03", 0, 2, -1, True, False, None, 1.0, "", b"3", ("3",)):
            assert missing not in file
            assert file.get(missing) is None
            for look in (file.__getitem__, file.blob, file.place, file.fields):
                with pytest.raises(MissingError, match=r"no such layer: expected one of 3, .* \(file .*\)") as caught:
                    look(missing)
                assert isinstance(caught.value, KeyError)
                assert caught.value.got == missing


@pytest.mark.parametrize(
    "key",
    ["+3", "-1", "٣", "１", "²", "1e3", "", " 3", "3 ", "3\n", "0x3", "1_0", "9" * 10, "3" * 5000, "a", "lm_head"],
)
def test_key_that_is_no_index(tmp_path: Path, key: str) -> None:
    """Only ASCII digits, and no more than nine; the key is shown so that a terminal survives it."""
    path = write(tmp_path / "m.uqff", {key: BLOB})
    with pytest.raises(FormatError, match="key is not a layer index") as caught:
        uqff.open(path)
    assert caught.value.got == key
    assert caught.value.file == str(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["0", "00", "03", "000000007", "9" * 9])
def test_key_that_is_an_index(tmp_path: Path, key: str) -> None:
    """The near misses."""
    with uqff.open(write(tmp_path / "m.uqff", {key: BLOB})) as file:
        assert list(file) == [key]
        assert file[int(key)] == uqff.deserialize(BLOB)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"0": entry(4, dtype="F32", shape=[1])}, b"1234"),
        ({"0": entry(4, dtype="I8")}, b"1234"),
        ({"0": entry(4, shape=[2, 2])}, b"1234"),
        ({"0": entry(1, shape=[])}, b"1"),
    ],
)
def test_entry_that_is_no_blob(tmp_path: Path, fields: dict[str, object], data: bytes) -> None:
    """A blob is U8 of one dimension."""
    (tmp_path / "m.uqff").write_bytes(framed(fields, data))
    with pytest.raises(FormatError, match="blob is not a row of bytes"):
        uqff.open(tmp_path / "m.uqff")


def test_plain_safetensors_file_is_refused(tmp_path: Path) -> None:
    """A checkpoint is no UQFF file, whatever its name."""
    (tmp_path / "m.uqff").write_bytes(safetensors.numpy.save({"lm_head.weight": np.zeros((2, 2), np.float32)}))
    with pytest.raises(FormatError, match="not a UQFF file: a safetensors file of plain tensors"):
        uqff.open(tmp_path / "m.uqff")


def test_empty_model(tmp_path: Path) -> None:
    """No layers, no error; the version is the first there was."""
    (tmp_path / "m.uqff").write_bytes(framed({}))
    with uqff.open(tmp_path / "m.uqff") as file:
        assert (len(file), list(file), file.version, file.metadata) == (0, [], Version(0, 1, 0), {})


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def test_broken_layer_is_found_when_asked_for(tmp_path: Path) -> None:
    """Opening reads headers only; the error names file, layer, field, and the offset in the file."""
    broken = BLOBS["afq"][:-1] + b"\x21"
    path = write(tmp_path / "m.uqff", {"0": BLOB, "1": broken, "2": b"", "3": header(9) + run(3)})
    with uqff.open(path) as file:
        assert file["0"] == uqff.deserialize(BLOB)
        begin = file.place("1").offset
        for read in (file.__getitem__, file.fields):
            with pytest.raises(FormatError) as caught:
                read("1")
            assert caught.value.file == str(path)
            assert caught.value.layer == "1"
            assert caught.value.field == "group_size"
            assert caught.value.offset == begin + len(broken) - 1
            assert path.read_bytes()[caught.value.offset] == 0x21
            with pytest.raises(FormatError, match="truncated") as caught:
                read("2")
            assert (caught.value.field, caught.value.offset) == ("version", file.place("2").offset)
        with pytest.raises(UqffError) as raised:
            _ = file.version
        assert (raised.value.file, raised.value.layer) == (str(path), "2")


def test_place_and_fields(model: Path) -> None:
    """Offset and length in the file, and the fields without tensors."""
    data = model.read_bytes()
    with uqff.open(model) as file:
        for key, blob in MIXED.items():
            place = file.place(key)
            assert isinstance(place, Place)
            assert place.path == model
            assert data[place.offset : place.offset + place.nbytes] == blob
            trace: list[FieldTrace] = []
            record, fields = file.fields(key, trace=trace)
            assert record.family is fields["quant_type"]
            assert len(trace) > 4


# ---------------------------------------------------------------------------------------------------------------------
# Version, metadata, residual
# ---------------------------------------------------------------------------------------------------------------------


def test_version_is_the_highest(tmp_path: Path) -> None:
    """Compared as numbers, over all shards."""
    old = header(0, (0, 1, 3)) + BLOBS["gguf"][5:]
    write(tmp_path / "m-0.uqff", {"0": header(0, (0, 1, 1)) + BLOBS["gguf"][5:]})
    write(tmp_path / "m-1.uqff", {"1": old})
    with uqff.open(tmp_path) as file:
        assert file.version == Version(0, 1, 3)


def test_metadata_of_all_shards(tmp_path: Path) -> None:
    """None in files of the engine; kept where there is some."""
    (tmp_path / "m-0.uqff").write_bytes(framed({"__metadata__": {"a": "1"}, "0": entry(len(BLOB))}, BLOB))
    (tmp_path / "m-1.uqff").write_bytes(framed({"__metadata__": {"b": "2"}, "1": entry(len(BLOB))}, BLOB))
    with uqff.open(tmp_path) as file:
        assert file.metadata == {"a": "1", "b": "2"}


def test_residual(model: Path) -> None:
    """The plain tensors beside the file: lazy, views, every dtype numpy has; empty where there is none."""
    with uqff.open(model) as file:
        assert dict(file.residual) == {}
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "norm.weight": np.arange(3, dtype=np.float32),
        "half": np.ones((2, 2), np.float16),
        "scalar": np.array(7, np.int64),
        "nothing": np.empty((0, 4), np.float32),
        "flags": np.array([True, False]),
        "bytes": np.arange(5, dtype=np.uint8),
        "u16": np.arange(5, dtype=np.uint16),
    }
    (model.parent / "residual.safetensors").write_bytes(safetensors.numpy.save(tensors))
    with uqff.open(model) as file:
        assert set(file.residual) == set(tensors)
        for name, array in tensors.items():
            tensor = file.residual[name]
            assert tuple(tensor.shape) == array.shape
            assert tensor.numpy().tobytes() == array.tobytes()
            assert file.residual.entry(name).shape == array.shape
        for look in (file.residual.__getitem__, file.residual.raw, file.residual.entry):
            with pytest.raises(MissingError, match=r"no such tensor \(file .*residual.safetensors, field gone\)"):
                look("gone")


def test_broken_residual_is_found_when_asked_for(model: Path) -> None:
    """It does not keep the layers from being read."""
    (model.parent / "residual.safetensors").write_bytes(b"nothing of the kind")
    with uqff.open(model) as file:
        assert file["0"] == uqff.deserialize(MIXED["0"])
        with pytest.raises(FormatError) as caught:
            _ = file.residual
        assert caught.value.file == str(model.parent / "residual.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Memory and lifetimes
# ---------------------------------------------------------------------------------------------------------------------


def test_layers_outlive_the_file(model: Path) -> None:
    """Views keep their mapping, after ``close`` and after everything else is forgotten."""
    with uqff.open(model) as file:
        layers = list(file.values())
        blob = file.blob("0")
    model.unlink()
    del file
    gc.collect()
    assert [uqff.serialize(layer) for layer in layers] == list(MIXED.values())
    assert bytes(blob) == MIXED["0"]


def test_closed_file_says_so(model: Path) -> None:
    """Not that the model is truncated. Keys and places are known still."""
    file = uqff.open(model)
    file.close()
    file.close()
    assert list(file) == list(MIXED)
    assert file.place("0").nbytes == len(MIXED["0"])
    for read in (file.__getitem__, file.blob, file.fields):
        with pytest.raises(ValueError, match="file is closed"):
            read("0")


def test_payloads_at_any_file_offset_are_views(tmp_path: Path) -> None:
    """Blobs lie where they lie, at odd offsets too; the mapping is shared, not copied."""
    for pad in range(8):
        path = write(
            tmp_path / f"m{pad}x.uqff", {"0": header(0) + bytes(pad), "1": BLOBS["gguf"], "2": BLOBS["unquant"]}
        )
        with uqff.open(path) as file:
            for key in ("1", "2"):
                memory = np.frombuffer(file.blob(key), np.uint8)
                begin = memory.__array_interface__["data"][0]
                pointer = file[key].weight.data.data_ptr()  # type: ignore[attr-defined]
                assert begin < pointer < begin + len(memory)


def test_file_on_disk_cannot_be_changed_through_a_tensor(model: Path) -> None:
    """The mapping is copy-on-write."""
    before = model.read_bytes()
    with uqff.open(model) as file:
        file["0"].weight.data.fill_(0)  # type: ignore[attr-defined]
        assert not file["0"].weight.data.any()  # type: ignore[attr-defined]
    assert model.read_bytes() == before
    with uqff.open(model) as file:
        assert bytes(file.blob("0")) == MIXED["0"]


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A sparse file of a terabyte opens at once, and torch is not even imported."""
    size = 2**40
    path = tmp_path / "m.uqff"
    path.write_bytes(framed({"0": entry(len(BLOB)), "1": entry(size, len(BLOB))}, BLOB))
    try:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + size)
    except OSError:
        pytest.skip("no sparse files of this size here")
    code = (
        "import sys, uqff\n"
        "with uqff.open(sys.argv[1]) as file:\n"
        "    assert list(file) == ['0', '1']\n"
        "    assert file.place('1').nbytes == 2**40\n"
        "    assert file.fields('0')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(path)], check=True)


def test_readers_in_many_threads(model: Path) -> None:
    """One open file serves them all."""
    expected = {key: uqff.deserialize(blob) for key, blob in MIXED.items()}
    wrong: list[str] = []
    with uqff.open(model) as file:

        def read() -> None:
            for _ in range(10):
                wrong.extend(key for key in file if file[key] != expected[key])

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_open_in_a_loop_leaks_no_descriptors(model: Path) -> None:
    """Neither good files nor bad ones."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    bad = model.with_name("bad.uqff")
    bad.write_bytes(file_of(MIXED) + b"x")
    gc.collect()
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        uqff.open(model).close()
        with pytest.raises(FormatError):
            uqff.open(bad)
    gc.collect()
    assert len(list(descriptors.iterdir())) <= before


def test_files_compare_by_their_layers(model: Path, tmp_path: Path) -> None:
    """Two copies of a model are equal mappings."""
    copy = write(tmp_path / "copy.uqff", MIXED)
    other = write(tmp_path / "other.uqff", {**MIXED, "0": BLOB})
    with uqff.open(model) as one, uqff.open(copy) as two, uqff.open(other) as three:
        assert one == two
        assert one != three
        assert dict(one) == {key: uqff.deserialize(blob) for key, blob in MIXED.items()}
        assert isinstance(one["0"], Layer)
        mine, own = one["1"].bias, uqff.deserialize(MIXED["1"]).bias
        assert mine is not None
        assert own is not None
        assert torch.equal(mine, own)
