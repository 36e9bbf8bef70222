"""Any bytes at all: every truncation, every single-byte mutation, random bytes. Only ``UqffError`` may come out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.codec.test_entries import plain
from tests.support.samples import BLOBS, entry, file_of, framed, u32
from tests.support.samples_v1 import BIAS, LAYERS, SIZES, Tensor, layer, version
from tests.support.samples_v1 import file_of as entry_file
from tests.support.strategies import hostile_bytes, layers
from uqff import FormatError, Layer, UqffError
from uqff.codec.blob import family_of_blob, read_fields, trace
from uqff.codec.entries import to_entries


def parses_or_raises(data: bytes) -> bool:
    """Parse; what parses must come back as those very bytes, what does not must say where.

    Returns:
        Whether it parsed.
    """
    try:
        layer = uqff.deserialize(data)
    except UqffError as raised:
        error = raised
    else:
        assert uqff.serialize(layer, version=trace(data)[0].value) == data
        return True
    assert error.offset is not None, str(error)
    assert 0 <= error.offset <= len(data), str(error)
    assert str(error).isprintable()
    assert error.field is not None or error.problem == "trailing bytes", str(error)
    return False


@pytest.mark.parametrize("name", BLOBS)
def test_every_truncation_raises_format_error(name: str) -> None:
    """No prefix of a blob is a blob, and each says which field is cut."""
    blob = BLOBS[name]
    for end in range(len(blob)):
        with pytest.raises(FormatError) as caught:
            uqff.deserialize(blob[:end])
        assert caught.value.field is not None
        assert caught.value.offset is not None
        assert caught.value.offset <= end


@given(layers(), st.data())
def test_truncation_of_any_layer_raises_format_error(layer: Layer, data: st.DataObject) -> None:
    """The same for generated layers of every family."""
    blob = uqff.serialize(layer)
    with pytest.raises(FormatError):
        uqff.deserialize(blob[: data.draw(st.integers(0, len(blob) - 1))])


@pytest.mark.parametrize("name", BLOBS)
def test_every_single_byte_mutation_comes_back_or_raises(name: str) -> None:
    """Every bit of every byte flipped, every byte set to the values that fields know (``tests/spec``: all)."""
    blob = BLOBS[name]
    payload = {at for f in trace(blob) if f.path.endswith("data") for at in range(f.offset, f.offset + f.size)}
    parsed = 0
    for at, old in enumerate(blob):
        flipped = {old ^ 1 << bit for bit in (range(8) if at not in payload else (0, 7))}
        for new in flipped | ({*range(14), 255} if at not in payload else {0, 255}):
            if new != old:
                parsed += parses_or_raises(blob[:at] + bytes([new]) + blob[at + 1 :])
    assert parsed >= len(payload)


@given(hostile_bytes)
def test_random_and_mangled_bytes(data: bytes) -> None:
    """Noise, noise behind a valid header, and mangled blobs."""
    parses_or_raises(data)


@given(hostile_bytes)
def test_every_reader_of_blobs_raises_only_uqff_errors(data: bytes) -> None:
    """The cheap readers are as strict as the full one."""
    outcomes: set[Any] = set()
    for reader in (read_fields, trace):
        try:
            reader(data)
            outcomes.add(True)
        except UqffError as error:
            outcomes.add((type(error), error.problem, error.field, error.offset))
    assert len(outcomes) == 1
    try:
        family_of_blob(data)
    except UqffError:
        assert outcomes != {True}


def comes_back(file: uqff.UqffFile, key: str) -> bool:
    """Whether a layer that was read is written as the bytes that it was read from."""
    if file.generation == "0.x":
        return uqff.serialize(file[key], version=trace(file.blob(key))[0].value) == bytes(file.blob(key))
    version = (*file.version[:2], 0)
    return plain(to_entries(file[key], version)) == plain(file.entries(key))


def opens_or_raises(path: Path, data: bytes) -> bool:
    """Open and read everything; only ``UqffError`` may come out, naming the file."""
    path.write_bytes(data)
    try:
        with uqff.open(path) as file:
            assert str(file.version)
            assert all(comes_back(file, key) for key in file)
            assert repr(file)
            list(file.extra)
    except UqffError as raised:
        error = raised
    else:
        return True
    assert error.file == str(path)
    assert str(error).isprintable()
    assert error.offset is None or 0 <= error.offset <= len(data)
    return False


SMALL_FILES = {
    "0.x": file_of({"0": BLOBS["gguf"], "1": BLOBS["mxfp4-bias"]}),
    "1.x": entry_file({**version(), **layer("a", {**LAYERS["mxfp4"], "bias": BIAS})}),
}


@pytest.mark.parametrize("generation", SMALL_FILES)
def test_every_truncation_of_a_file_raises(tmp_path: Path, generation: str) -> None:
    """A download that stopped is never half a model."""
    whole = SMALL_FILES[generation]
    for end in range(len(whole)):
        assert not opens_or_raises(tmp_path / "x.uqff", whole[:end])
    assert opens_or_raises(tmp_path / "x.uqff", whole)


@pytest.mark.parametrize("generation", SMALL_FILES)
def test_every_single_byte_mutation_of_a_file(tmp_path: Path, generation: str) -> None:
    """The container's own bytes: length, JSON; each to several values."""
    whole = SMALL_FILES[generation]
    bits = (1, 2, 16, 128) if generation == "0.x" else (1, 64)
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        for new in {whole[at] ^ bit for bit in bits} | set(b'0"{, ' if generation == "0.x" else b'"1'):
            if new != whole[at]:
                opens_or_raises(tmp_path / "x.uqff", whole[:at] + bytes([new]) + whole[at + 1 :])


DTYPES = sorted(SIZES)
ENTRY_NAMES = sorted({*version(), *(f"{key}.{suffix}" for key in "ab" for each in LAYERS.values() for suffix in each)})


@st.composite
def models_of_entries(draw: st.DrawFn) -> dict[str, Tensor]:
    """A sound 1.x file with entries dropped, renamed, and filled with other dtypes, shapes and numbers."""
    tensors = version(1, draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    for key in "ab":
        tensors |= layer(key, LAYERS[draw(st.sampled_from(sorted(LAYERS)))])
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(tensors)))
        dtype, shape, content = tensors.pop(name)
        change = draw(st.sampled_from(["drop", "rename", "number", "dims", "shape", "dtype"]))
        if change == "rename":
            name = draw(st.sampled_from(ENTRY_NAMES) | st.text("ab.weight", max_size=9))
        elif change == "number":
            content = draw(st.binary(min_size=len(content), max_size=len(content)))
        elif change == "dims":
            numbers = draw(st.lists(st.sampled_from([0, 1, 2, 32, 2**16, 2**31, 2**32 - 1]), max_size=9))
            dtype, shape, content = "U32", (len(numbers),), u32(*numbers)
        elif change == "shape":
            shape = draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
            content = bytes(math.prod(shape) * SIZES[dtype])
        elif change == "dtype":
            dtype = draw(st.sampled_from(DTYPES))
            content = bytes(math.prod(shape) * SIZES[dtype])
        if change != "drop":
            tensors[name] = (dtype, shape, content)
    return tensors


@given(models_of_entries())
def test_mangled_models_of_entries(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> None:
    """Whatever stands under the names of a 1.x file: the layers that it holds, or an error."""
    opens_or_raises(tmp_path_factory.getbasetemp() / "mangled.uqff", entry_file(tensors))


@given(st.data())
def test_random_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random bytes, and random JSON in a sound frame."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=6,
    )
    entries = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F32", "F4", "BOOL", "u8", ""]) | values,
            "shape": st.lists(st.integers(0, 20), max_size=2) | values,
            "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | values,
        }
    )
    keys = st.text(max_size=4) | st.sampled_from(
        ["0", "1", "00", "__metadata__", "a", "-1", "+1", "1e3", "٣", "", "a.weight.format", "uqff.version.major"]
    )
    sound = st.integers(0, 40).map(lambda size: {"0": entry(size)})
    headers = sound | st.dictionaries(keys, entries | values, max_size=3)
    framed_files = st.builds(framed, headers, st.binary(max_size=60))
    raw = data.draw(st.binary(max_size=80) | framed_files)
    opens_or_raises(tmp_path_factory.getbasetemp() / "random.uqff", raw)
