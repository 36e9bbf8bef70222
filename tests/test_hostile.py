"""Any bytes at all: every truncation, every single-byte mutation, random bytes. Only ``UqffError`` may come out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import BLOBS, entry, file_of, framed
from strategies import hostile_bytes, layers

import uqff
from uqff import FormatError, Layer, UqffError
from uqff.blob import family_of_blob, read_fields, trace


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
    outcomes = set()
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


def opens_or_raises(path: Path, data: bytes) -> bool:
    """Open and read everything; only ``UqffError`` may come out, naming the file."""
    path.write_bytes(data)
    try:
        with uqff.open(path) as file:
            assert str(file.version)
            for key in file:
                assert uqff.serialize(file[key], version=trace(file.blob(key))[0].value) == bytes(file.blob(key))
            assert repr(file)
    except UqffError as raised:
        error = raised
    else:
        return True
    assert error.file == str(path)
    assert str(error).isprintable()
    assert error.offset is None or 0 <= error.offset <= len(data)
    return False


SMALL_FILE = file_of({"0": BLOBS["gguf"], "1": BLOBS["mxfp4-bias"]})


def test_every_truncation_of_a_file_raises(tmp_path: Path) -> None:
    """A download that stopped is never half a model."""
    for end in range(len(SMALL_FILE)):
        assert not opens_or_raises(tmp_path / "x.uqff", SMALL_FILE[:end])
    assert opens_or_raises(tmp_path / "x.uqff", SMALL_FILE)


def test_every_single_byte_mutation_of_a_file(tmp_path: Path) -> None:
    """The container's own bytes: length, JSON; each to several values."""
    header_end = 8 + int.from_bytes(SMALL_FILE[:8], "little")
    for at in range(header_end):
        for new in {SMALL_FILE[at] ^ bit for bit in (1, 2, 16, 128)} | set(b'0"{, '):
            if new != SMALL_FILE[at]:
                opens_or_raises(tmp_path / "x.uqff", SMALL_FILE[:at] + bytes([new]) + SMALL_FILE[at + 1 :])


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
    keys = st.sampled_from(["0", "1", "00", "__metadata__", "a", "-1", "+1", "1e3", "٣", ""]) | st.text(max_size=4)
    sound = st.integers(0, 40).map(lambda size: {"0": entry(size)})
    headers = sound | st.dictionaries(keys, entries | values, max_size=3)
    framed_files = st.builds(framed, headers, st.binary(max_size=60))
    raw = data.draw(st.binary(max_size=80) | framed_files)
    opens_or_raises(tmp_path_factory.getbasetemp() / "random.uqff", raw)
