"""Opening and saving 1.x files: keys, shards, versions, extras, hostile headers, and the engine's own container."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.codec.test_entries import versions_of
from tests.support.samples import BLOBS, framed, run
from tests.support.samples import write as write_v0
from tests.support.samples_v1 import BIAS, LAYERS, Tensor, byte, dims, file_of, layer, number, version, write
from tests.support.strategies import layers
from uqff import FormatError, Layer, ShardError, UnsupportedError, UqffError, Version
from uqff.codes import ENTRY_VERSIONS
from uqff.container.plan import Item, cut
from uqff.progress import Step

MIXED = {f"model.layers.{at}.{name}": entries for at, (name, entries) in enumerate(LAYERS.items())}
ALL = [tensors for key, entries in MIXED.items() for tensors in [layer(key, entries)]]
PATH = "model.layers.0.mlp.up_proj"


def test_every_family_in_one_file(tmp_path: Path) -> None:
    """Keys are paths, sorted; layers are those of the blobs of the same parts; metadata and version are there."""
    path = tmp_path / "m-0.uqff"
    path.write_bytes(file_of({n: t for part in [version(), *ALL] for n, t in part.items()}, {"uqff.producer": "x"}))
    with uqff.open(path) as file:
        assert (file.generation, file.version) == ("1.x", Version(1, 2, 0))
        assert file.metadata == {"uqff.producer": "x"}
        assert list(file) == sorted(MIXED)
        assert [file.key(at) for at in range(len(file))] == list(file)
        outside: tuple[Any, ...] = (-1, len(file))
        assert all(at not in file for at in outside)
        assert dict(file.extra) == {}
        for key in file:
            name = key.rpartition(".")[2]
            assert file[key] == uqff.deserialize(BLOBS[name])
            assert {s: e.dtype for s, e in file.entries(key).items()} == {s: t[0] for s, t in LAYERS[name].items()}
        with pytest.raises(UnsupportedError, match="no blob"):
            file.blob(key)
        with pytest.raises(KeyError):
            _ = file["0"]
    assert file.paths == (path,)


def test_places_are_those_of_the_reference(tmp_path: Path) -> None:
    """Each entry lies where the safetensors library finds its bytes."""
    path = write(tmp_path / "m.uqff", version(), *ALL)
    data = path.read_bytes()
    with uqff.open(path) as file:
        for key, entries in MIXED.items():
            for suffix, place in file.places(key).items():
                assert data[place.offset : place.offset + place.nbytes] == entries[suffix][2]
            assert file.place(key) == file.places(key)["weight"]
    assert set(safetensors.torch.load(data)) >= {f"{key}.weight" for key in MIXED}


def test_trace_names_every_entry(tmp_path: Path) -> None:
    """With offsets in the file, values of numbers, and the meanings of the declaration."""
    path = write(tmp_path / "m.uqff", version(), layer(PATH, {**LAYERS["hqq"], "bias": BIAS}))
    trace: list[Any] = []
    with uqff.open(path) as file:
        file.fields(PATH, trace=trace)
        places = file.places(PATH)
    rows = {field.path: field for field in trace}
    assert {suffix: (f.offset, f.size) for suffix, f in rows.items()} == {s: p[1:] for s, p in places.items()}
    assert (rows["weight.bits"].value, rows["weight.shape"].value) == (4, (2, 4))
    assert rows["weight.group_size"].type == "U32 []"
    assert all(field.meaning for field in trace)
    path = write(tmp_path / "fp8.uqff", version(), layer(PATH, LAYERS["fp8"]))
    with uqff.open(path) as file:
        trace.clear()
        file.fields(PATH, trace=trace)
    assert {f.path: f.value for f in trace}["weight.dequant_w_scale"] == 0.25


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", range(1, 12))
def test_layers_that_straddle_shards(tmp_path: Path, name: str, cut: int) -> None:
    """Any entries in any shard; the second one has no version and perhaps no format."""
    entries = list(layer(PATH, {**LAYERS[name], "bias": BIAS} if name != "mxfp4" else LAYERS[name]).items())
    if cut >= len(entries):
        return
    first = write(tmp_path / "m-0.uqff", version(), dict(entries[:cut]))
    second = write(tmp_path / "m-1.uqff", dict(entries[cut:]))
    whole = write(tmp_path / "whole.uqff", version(), dict(entries))
    with uqff.open(first) as file, uqff.open(whole) as other:
        assert file.paths == (first, second)
        assert file[PATH] == other[PATH]
    with uqff.open([second, first]) as file:
        assert list(file) == [PATH]


def test_stacked_experts(tmp_path: Path) -> None:
    """``[E, out, in]``, with a bias for each expert's outputs."""
    key = "model.layers.0.mlp.experts.gate_proj"
    stacked: dict[str, Tensor] = {
        "weight.format": byte(0),
        "weight": ("U8", (4 * 18,), run(72)),
        "weight.dtype": number(2),
        "weight.shape": dims(2, 2, 32),
        "bias": ("F32", (2, 2), bytes(16)),
    }
    with uqff.open(write(tmp_path / "m.uqff", version(), layer(key, stacked))) as file:
        assert file[key].weight.shape == (2, 2, 32)
        assert file[key].weight.dequantize().shape == (2, 2, 32)


def test_extra_entries_are_kept(tmp_path: Path) -> None:
    """What belongs to no layer is no error, and can be had."""
    extra: dict[str, Tensor] = {
        "uqff.calibration": ("F32", (2,), struct.pack("<2f", 1, 2)),
        "model.norm.weight": ("BF16", (3,), run(6)),
        "other.bias": ("U8", (1,), b"\7"),
        f"{PATH}.weight.future": ("U8", (1,), b"\1"),
        f"{PATH}.lora": ("U8", (0,), b""),
        "lm_head": ("U8", (), b"\1"),
    }
    with uqff.open(write(tmp_path / "m.uqff", version(), layer(PATH, LAYERS["gguf"]), extra)) as file:
        assert list(file) == [PATH]
        assert set(file.extra) == set(extra)
        assert file.extra["uqff.calibration"].tolist() == [1, 2]
        assert file.extra["other.bias"].tolist() == [7]


@pytest.mark.parametrize("shard_bytes", [40, 1 << 20])
def test_extra_entries_are_saved(shard_bytes: int, tmp_path: Path) -> None:
    """Of an open file, whatever their dtype, whether or not the file is cut."""
    extra: dict[str, Tensor] = {
        "uqff.calibration": ("F32", (2,), struct.pack("<2f", 1, 2)),
        "mask": ("BOOL", (3,), b"\1\0\1"),
        "tiny": ("F8_E5M2", (2, 2), run(4)),
        f"{PATH}.lora": ("U8", (0,), b""),
    }
    with uqff.open(write(tmp_path / "m.uqff", version(), layer(PATH, LAYERS["gguf"]), extra)) as file:
        paths = uqff.save(file, tmp_path / "copy.uqff", version=file.version, shard_bytes=shard_bytes)
        assert (len(paths) > 1) == (shard_bytes == 40)
        with uqff.open(paths) as copy:
            assert dict(copy.items()) == dict(file.items())
            assert set(copy.extra) == set(extra)
            for name, (dtype, shape, data) in extra.items():
                entry = copy.extra.entry(name)
                assert (entry.dtype, entry.shape, bytes(copy.extra.raw(name))) == (dtype, shape, data)


def test_keys_that_look_like_suffixes(tmp_path: Path) -> None:
    """The last word of a name decides: there is one way to read it."""
    keys = ["a", "a.weight", "a.weight.bias", "a.bias", "a.weight.scales"]
    path = write(tmp_path / "m.uqff", version(), *(layer(key, LAYERS["gguf"]) for key in keys))
    with uqff.open(path) as file:
        assert list(file) == sorted(keys)
        assert all(file[key] == file["a"] for key in keys)


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [((0, 2, 0), "unknown version"), ((2, 0, 0), "unknown version"), ((1, 3, 0), "unknown version")],
)
def test_other_versions_are_refused(tmp_path: Path, numbers: tuple[int, int, int], problem: str) -> None:
    """As the engine does: major must be 1, minor at most 2."""
    path = write(tmp_path / "m.uqff", version(*numbers), layer(PATH, LAYERS["gguf"]))
    with pytest.raises(UnsupportedError, match=problem) as caught:
        uqff.open(path)
    assert caught.value.field in ("uqff.version.major", "uqff.version.minor")
    assert caught.value.got == Version(*numbers)


@pytest.mark.parametrize("numbers", [(1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 0, 7), (1, 2, 2**32 - 1)])
def test_patch_is_free(tmp_path: Path, numbers: tuple[int, int, int]) -> None:
    """The near misses of the rule above."""
    with uqff.open(write(tmp_path / "m.uqff", version(*numbers), layer(PATH, LAYERS["gguf"]))) as file:
        assert file.version == numbers
        assert file.fields(PATH)[1]["version"] == numbers


@pytest.mark.parametrize("missing", version())
def test_each_part_of_the_version_is_needed(tmp_path: Path, missing: str) -> None:
    """Also the patch."""
    numbers = {name: tensor for name, tensor in version().items() if name != missing}
    with pytest.raises(FormatError, match="missing entry") as caught:
        uqff.open(write(tmp_path / "m.uqff", numbers, layer(PATH, LAYERS["gguf"])))
    assert caught.value.field == missing
    with pytest.raises(ShardError, match="gap in a set of shards"):
        uqff.open(write(tmp_path / "n-3.uqff", layer(PATH, LAYERS["gguf"])))


@pytest.mark.parametrize("wrong", [("U32", (1,), b"\1\0\0\0"), byte(1), ("I64", (), bytes(8))])
def test_version_is_a_number(tmp_path: Path, wrong: Tensor) -> None:
    """U32 [], nothing like it."""
    for name in version():
        with pytest.raises(FormatError, match="version is not a number") as caught:
            uqff.open(write(tmp_path / "m.uqff", {**version(), name: wrong}))
        assert caught.value.field == name


def test_versions_of_several_shards(tmp_path: Path) -> None:
    """Equal ones may repeat; others are an error that names both files."""
    write(tmp_path / "m-0.uqff", version(), layer("a", LAYERS["gguf"]))
    second = write(tmp_path / "m-1.uqff", version(), layer("b", LAYERS["afq"]))
    with uqff.open(second) as file:
        assert list(file) == ["a", "b"]
    write(second, version(1, 1, 0), layer("b", LAYERS["afq"]))
    with pytest.raises(ShardError, match="shards of several versions") as caught:
        uqff.open(second)
    assert (caught.value.file, caught.value.field) == (str(second), "uqff.version.minor")
    assert (caught.value.expected, caught.value.got) == ("2 as in m-0.uqff", 1)


def test_key_in_two_shards(tmp_path: Path) -> None:
    """Even with equal bytes, even an entry that nobody knows."""
    for again in ({f"{PATH}.weight": LAYERS["gguf"]["weight"]}, {"extra": byte(1)}):
        write(tmp_path / "m-0.uqff", version(), layer(PATH, LAYERS["gguf"]), {"extra": byte(1)})
        second = write(tmp_path / "m-1.uqff", again)
        with pytest.raises(ShardError, match="key occurs in two shards") as caught:
            uqff.open(second)
        assert (caught.value.file, caught.value.field) == (str(second), next(iter(again)))
        assert "m-0.uqff" in str(caught.value)


@pytest.mark.parametrize("suffix", [s for s in LAYERS["hqq"] if s.count(".") and s != "weight.format"])
def test_companion_without_format(tmp_path: Path, suffix: str) -> None:
    """Its family would be a guess."""
    path = write(tmp_path / "m.uqff", version(), {f"x.{suffix}": LAYERS["hqq"][suffix]})
    with pytest.raises(FormatError, match="missing entry") as caught:
        uqff.open(path)
    assert (caught.value.layer, caught.value.field) == ("x", "weight.format")
    assert caught.value.offset is not None


@pytest.mark.parametrize("name", LAYERS)
def test_broken_layer_is_placed(tmp_path: Path, name: str) -> None:
    """A layer's error names file, layer, entry and offset, is raised when it is asked for, and spares the others."""
    good = layer("good", LAYERS["gguf"])
    for suffix in LAYERS[name]:
        if suffix == "weight.format":
            continue
        without = layer("x", {s: t for s, t in LAYERS[name].items() if s != suffix})
        path = write(tmp_path / "m.uqff", version(), without, good)
        with uqff.open(path) as file:
            assert file["good"].weight.kind == "q4_0"
            for ask in (lambda: file["x"], lambda: file.fields("x")):
                with pytest.raises(FormatError, match="missing entry") as caught:
                    ask()
                error = caught.value
                assert (error.file, error.layer, error.field) == (str(path), "x", suffix)
                assert error.offset == file.places("x")["weight.format"].offset


def test_error_in_the_other_shard(tmp_path: Path) -> None:
    """The file named is the one that holds the broken entry."""
    entries = {**LAYERS["afq"], "weight.bits": byte(5)}
    write(tmp_path / "m-0.uqff", version(), layer("x", {s: t for s, t in entries.items() if s != "weight.bits"}))
    second = write(tmp_path / "m-1.uqff", layer("x", {"weight.bits": entries["weight.bits"]}))
    with uqff.open(second) as file, pytest.raises(FormatError, match="value out of range") as caught:
        _ = file["x"]
    assert (caught.value.file, caught.value.field) == (str(second), "weight.bits")
    assert second.read_bytes()[caught.value.offset or 0] == 5


def test_generations_do_not_mix(tmp_path: Path) -> None:
    """A pre-1.0 blob among entries is nobody's layer."""
    write(tmp_path / "m-0.uqff", version(), layer(PATH, LAYERS["gguf"]))
    write_v0(tmp_path / "m-1.uqff", {"0": BLOBS["gguf"]})
    with pytest.raises(FormatError, match=r"pre-1\.0 blob in a 1\.x file"):
        uqff.open(tmp_path)
    with uqff.open([tmp_path / "m-1.uqff"]) as file:
        assert (file.generation, dict(file.extra)) == ("0.x", {})
        assert list(file.places(0)) == [""]
        with pytest.raises(UnsupportedError, match="no entries"):
            file.entries("0")


def test_layer_needs_a_key(tmp_path: Path) -> None:
    """A name that is all suffix."""
    with pytest.raises(FormatError, match="layer without a key"):
        uqff.open(write(tmp_path / "m.uqff", version(), layer("", LAYERS["gguf"])))


def test_opening_does_not_import_torch(tmp_path: Path) -> None:
    """Nor does asking for fields."""
    import subprocess
    import sys

    path = write(tmp_path / "m.uqff", version(), *ALL)
    code = (
        f"import sys, uqff; f = uqff.open({str(path)!r}); [f.fields(k) for k in f]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all examples of a property."""
    return tmp_path_factory.mktemp("v1")


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_mutated_and_truncated_files(scratch: Path, at: int, value: int) -> None:
    """One byte changed, or the end cut off: the layers, or a UqffError; never anything else."""
    data = bytearray(file_of({n: t for part in [version(), *ALL] for n, t in part.items()}))
    at %= len(data)
    for broken in (bytes(data[:at]), bytes(data[:at]) + bytes([value]) + bytes(data[at + 1 :])):
        path = scratch / "m.uqff"
        path.write_bytes(broken)
        try:
            with uqff.open(path) as file:
                for key in file:
                    _ = file[key]
                list(file.extra.values())
        except UqffError as error:
            assert str(error).isprintable()  # noqa: PT017


def tensors_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header less metadata, and data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return header, data[end:]


def test_saved_file_is_that_of_the_reference(tmp_path: Path) -> None:
    """Order, offsets and bytes of the safetensors library; metadata with our own producer."""
    path = write(tmp_path / "m.uqff", version(), *ALL)
    with uqff.open(path) as file:
        (out,) = uqff.save(file, tmp_path / "out-0.uqff", version=(1, 2, 0))
    assert tensors_of(out) == tensors_of(path)
    with uqff.open(out) as file:
        assert file.metadata == {
            "uqff.producer": "uqff",
            "uqff.version": "1.2.0",
            "uqff.producer.uqff.version": uqff.__version__,
        }
    other = tmp_path / "reference"
    safetensors.torch.save_file(safetensors.torch.load_file(out), other)
    assert tensors_of(other) == tensors_of(out)


def test_metadata_since_1_1(tmp_path: Path) -> None:
    """1.0 files have none."""
    weights = {"a": uqff.deserialize(BLOBS["gguf"])}
    for wanted in ENTRY_VERSIONS:
        (out,) = uqff.save(weights, tmp_path / f"{wanted}.uqff", version=wanted)
        with uqff.open(out) as file:
            assert file.version == wanted
            assert file.metadata.get("uqff.version") == (None if wanted == (1, 0, 0) else str(wanted))


@given(made=st.dictionaries(st.text("ab.", min_size=1, max_size=5), layers(), min_size=1, max_size=4), data=st.data())
def test_round_trip_of_files(scratch: Path, made: dict[str, Layer], data: st.DataObject) -> None:
    """Any layers, in any version that can express them, in shards of any size: the same layers in sorted order."""
    possible = set.intersection(*(set(versions_of(layer)) for layer in made.values()))
    if not possible:
        return
    wanted = data.draw(st.sampled_from(sorted(possible)))
    folder = scratch / "round"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    paths = uqff.save(made, folder / "m-0.uqff", version=wanted, shard_bytes=data.draw(st.integers(1, 400)))
    with uqff.open(folder) as file:
        assert file.paths == tuple(paths)
        assert list(file) == sorted(made)
        assert {key: file[key] for key in file} == made
        assert file.version == wanted


def test_shards_are_cut_between_entries() -> None:
    """As the engine: version first, a shard is closed before an entry that would pass the bound, or when it is full."""
    sizes = [4, 4, 4, 1, 30, 4, 8, 50, 10, 10]
    items = [Item("k", str(at), "U8", (size,)) for at, size in enumerate(sizes)]
    assert [[item.nbytes for item in shard] for shard in cut(items, 20)] == [
        [4, 4, 4, 1],
        [30],
        [4, 8],
        [50],
        [10, 10],
    ]
    assert [len(shard) for shard in cut(items, 12)] == [3, 1, 1, 2, 1, 1, 1]


def test_layer_cut_between_shards_is_saved(tmp_path: Path) -> None:
    """Every byte where it belongs, and a stale shard of another set is not left behind."""
    made = {key: uqff.deserialize(BLOBS[key]) for key in LAYERS}
    steps: list[Step] = []
    paths = uqff.save(
        made,
        tmp_path / "m.uqff",
        version=(1, 1, 0),
        shard_bytes=48,
        progress=steps.append,
    )
    assert len(paths) > 5
    assert [path.name for path in paths] == [f"m-{n}.uqff" for n in range(len(paths))]
    total = sum(len(tensors_of(path)[1]) for path in paths) - 12  # without the version
    assert (steps[-1].work_done, steps[-1].work) == (total, total)
    assert [step.key for step in steps] == sorted(made)
    with uqff.open(paths[0]) as file:
        assert {key: file[key] for key in file} == made
        assert max(len({place.path for place in file.places(key).values()}) for key in file) > 1
    with pytest.raises(ShardError, match="another set"):
        uqff.save(made, tmp_path / "m-0.uqff", version=(1, 1, 0), shard_bytes=100)


@pytest.mark.parametrize("key", [0, "0", "12", "", None, True, "\ud800"])
def test_keys_that_are_no_paths(tmp_path: Path, key: Any) -> None:
    """An index cannot be saved as 1.x; nothing is written."""
    with pytest.raises(FormatError, match=r"key is not the path|text is not Unicode"):
        uqff.save({key: uqff.deserialize(BLOBS["gguf"])}, tmp_path / "m.uqff", version=(1, 2, 0))
    with pytest.raises(FormatError, match="no layers"):
        uqff.save({}, tmp_path / "m.uqff", version=(1, 2, 0))
    assert list(tmp_path.iterdir()) == []


def test_what_a_version_cannot_express(tmp_path: Path) -> None:
    """The layer is named; an older file stays."""
    path = tmp_path / "m.uqff"
    path.write_bytes(b"old")
    made = {"a": uqff.deserialize(BLOBS["gguf"]), "b": uqff.deserialize(BLOBS["unquant"])}
    for wanted, problem in (((1, 0, 0), "did not exist yet"), ((1, 3, 0), "unknown version")):
        with pytest.raises(UnsupportedError, match=problem) as caught:
            uqff.save(made, path, version=wanted)
        assert caught.value.layer == ("b" if wanted == (1, 0, 0) else "a")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.uqff"]


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """A layer that changes, has no bytes, or fails the second time."""
    path = tmp_path / "m.uqff"
    path.write_bytes(b"old")
    meta = uqff.deserialize(BLOBS["gguf"]).weight.to("meta")
    with pytest.raises(FormatError, match="meta device"):
        uqff.save({"a": meta}, path, version=(1, 2, 0))

    class Changing(dict[str, Layer]):
        asked = 0

        def __getitem__(self, key: str) -> Layer:
            self.asked += 1
            return uqff.deserialize(BLOBS["gguf" if self.asked == 1 else "afq"])

    with pytest.raises(FormatError, match="layer changed while it was written"):
        uqff.save(Changing(a=Layer(meta)), path, version=(1, 2, 0))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.uqff"]


def test_closed_file(tmp_path: Path) -> None:
    """Layers taken out stay; asking again is an error."""
    path = write(tmp_path / "m.uqff", version(), layer(PATH, LAYERS["gguf"]))
    file = uqff.open(path)
    taken = file[PATH]
    file.close()
    assert taken == uqff.deserialize(BLOBS["gguf"])
    assert torch.isfinite(taken.weight.dequantize()).all()
    with pytest.raises(ValueError, match="closed"):
        _ = file[PATH]


def test_empty_header_is_0_x(tmp_path: Path) -> None:
    """A file of no entries has no generation of its own; it opens as ever."""
    path = tmp_path / "m.uqff"
    path.write_bytes(framed({}))
    with uqff.open(path) as file:
        assert (file.generation, len(file)) == ("0.x", 0)
