"""The blob: dispatch, versions, bias, both directions, buffers, lifetimes."""

from __future__ import annotations

import copy
import dataclasses
import gc
import mmap
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

import uqff
from tests.support.roundtrip import assert_both_ways, assert_rebuilds, assert_tiled
from tests.support.samples import BIAS, BLOB, BLOBS, gguf, header, record, run, u32, unquant
from tests.support.strategies import WEIGHTS, layers, oldest_version, random_tensor, versioned_layers
from uqff import DType, Family, FormatError, Layer, ShapeError, UnsupportedError, Version
from uqff.codec.blob import LATEST, blob_size, chunks, family_of_blob, read_fields, trace
from uqff.codes import VERSIONS
from uqff.families import GGUF, Unquant
from uqff.families.gguf import blocks as ggml

FAMILIES = list(Family)


# ---------------------------------------------------------------------------------------------------------------------
# Both directions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOBS)
def test_hand_written_blob_round_trips(name: str) -> None:
    """Bytes written by ``struct`` alone come back as they were, and every byte belongs to a field."""
    assert_rebuilds(BLOBS[name])
    assert_tiled(BLOBS[name])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_round_trip_properties(family: Family) -> None:
    """``build(parse(b)) == b`` and ``parse(build(r)) == r``: every variant, version, dtype, rank, any bit pattern."""

    @given(versioned_layers(WEIGHTS[family]()))
    def both_ways(case: tuple[Layer, Version]) -> None:
        layer, version = case
        blob = assert_both_ways(layer, version)
        assert blob[:5] == header(family, version)
        assert family_of_blob(blob) is family

    both_ways()


@given(layers())
def test_trace_and_plain_parser_agree(layer: Layer) -> None:
    """Parsing with and without a trace gives the same fields."""
    blob = uqff.serialize(layer)
    with_trace, without = read_fields(blob, trace=[]), read_fields(blob)
    assert with_trace[0] is without[0]
    assert dict(with_trace[1]) == dict(without[1])


def test_chunks_are_the_blob_without_copies_of_payloads() -> None:
    """What ``save`` streams is what ``serialize`` joins, and a payload chunk is the tensor's own memory."""
    weight = uqff.deserialize(BLOBS["gguf-bias"]).weight
    assert isinstance(weight, GGUF)
    made = chunks(weight)
    assert b"".join(made) == uqff.serialize(weight)
    payload = max(made, key=lambda chunk: memoryview(chunk).nbytes)
    assert np.frombuffer(payload, np.uint8).__array_interface__["data"][0] == weight.data.data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------------------------------


@given(layers())
def test_every_version_writes_or_refuses(layer: Layer) -> None:
    """A version writes exactly what existed in it."""
    for version in VERSIONS:
        if version >= oldest_version(layer):
            assert uqff.serialize(layer, version=version)[:3] == bytes(reversed(version))
        else:
            with pytest.raises(UnsupportedError, match="did not exist yet"):
                uqff.serialize(layer, version=version)


@pytest.mark.parametrize(
    ("name", "dtype", "since"),
    [
        ("fp8", None, (0, 1, 2)),
        ("afq", None, (0, 1, 3)),
        ("f8q8", None, (0, 2, 0)),
        ("mxfp4", None, (0, 2, 0)),
        ("unquant", "I16", (0, 1, 1)),
        ("unquant", "F8E4M3", (0, 1, 2)),
        ("unquant", "F32", (0, 1, 0)),
    ],
)
def test_blob_older_than_its_content_is_refused(name: str, dtype: str | None, since: tuple[int, int, int]) -> None:
    """Reading checks what writing checks: no file of the past can hold what was not invented."""
    blob = BLOBS[name] if dtype is None else unquant(record(dtype, (1, 2), bytes(2 * DType[dtype].itemsize)))
    for version in VERSIONS:
        stamped = bytes([version.patch, version.minor, version.major]) + blob[3:]
        if version >= since:
            assert assert_rebuilds(stamped) == uqff.deserialize(blob)
        else:
            with pytest.raises(FormatError, match="did not exist yet"):
                uqff.deserialize(stamped)


@pytest.mark.parametrize("word", ["00000000", "04010000", "00030000", "01020000", "00000100", "00020001", "00000001"])
def test_unknown_version_is_refused(word: str) -> None:
    """Unknown numbers are a newer or another format, not a broken file; the top byte counts."""
    with pytest.raises(UnsupportedError, match="unknown version") as caught:
        uqff.deserialize(bytes.fromhex(word) + BLOB[4:])
    assert (caught.value.field, caught.value.offset) == ("version", 0)


@pytest.mark.parametrize(
    "version", [(0, 0, 256), (0, 1, 256), (0, 0, 512), (0, 3, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 0)]
)
def test_version_that_never_was_cannot_be_written(version: tuple[int, int, int]) -> None:
    """Numbers beyond a byte must not carry over into the next part."""
    with pytest.raises(UnsupportedError):
        uqff.serialize(uqff.deserialize(BLOB), version=version)


@pytest.mark.parametrize("family", [7, 8, 255])
def test_unknown_type_is_refused(family: int) -> None:
    """The type byte stands at offset 4 in every version."""
    with pytest.raises(UnsupportedError, match="unknown type") as caught:
        uqff.deserialize(BLOB[:4] + bytes([family]) + BLOB[5:])
    assert (caught.value.field, caught.value.offset, caught.value.got) == ("quant_type", 4, family)


# ---------------------------------------------------------------------------------------------------------------------
# Bias
# ---------------------------------------------------------------------------------------------------------------------

EXPERTS = gguf((3, 2, 32), 2, run(3 * 2 * 18))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((2,), True), ((3, 2), True), ((3,), False), ((2, 3), False), ((1,), False), ((6,), False), ((3, 2, 1), False)],
)
def test_bias_shape_of_stacked_experts(shape: tuple[int, ...], fits: bool) -> None:
    """A bias has one number per output, for each expert or for all in common; nothing else."""
    bias = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    weight = uqff.deserialize(EXPERTS).weight
    blob = EXPERTS[:9] + b"\1" + EXPERTS[10:] + record("F32", shape, bias.numpy().tobytes())
    if fits:
        assert uqff.serialize(weight, bias) == blob
        assert uqff.deserialize(blob) == Layer(weight, bias)
        return
    with pytest.raises(ShapeError, match="bias does not fit weight"):
        uqff.serialize(weight, bias)
    with pytest.raises(ShapeError, match="bias does not fit weight") as caught:
        uqff.deserialize(blob)
    assert caught.value.field == "bias.shape"
    assert caught.value.offset == len(EXPERTS) + 12


def test_weight_of_one_dimension_has_no_bias() -> None:
    """There is no output to add it to."""
    weight = uqff.deserialize(gguf((32,), 2, run(18))).weight
    with pytest.raises(ShapeError, match="expected no bias"):
        uqff.serialize(weight, torch.zeros(1))
    with pytest.raises(ShapeError):
        uqff.deserialize(gguf((32,), 2, run(18), record("F32", (), b"\0\0\0\0")))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not Family.GGUF], ids=lambda f: f.name)
@pytest.mark.parametrize("flag", [2, 7, 255])
def test_bias_flag_is_zero_or_one(family: Family, flag: int) -> None:
    """Any other byte would be lost on writing again, though the engine takes it for true."""
    blob = BLOBS[family.name.lower()]
    with pytest.raises(FormatError, match="value out of range") as caught:
        uqff.deserialize(blob[:5] + bytes([flag]) + blob[6:])
    assert (caught.value.field, caught.value.offset) == ("bias_flag", 5)


def test_bias_flag_of_gguf_stands_behind_the_length() -> None:
    """The one family that differs."""
    blob = BLOBS["gguf"]
    with pytest.raises(FormatError, match="value out of range") as caught:
        uqff.deserialize(blob[:9] + b"\2" + blob[10:])
    assert (caught.value.field, caught.value.offset) == ("bias_flag", 9)


def test_bias_argument_wins_over_the_bias_of_a_layer() -> None:
    """``serialize(layer)`` keeps the layer's bias; one that is given replaces it."""
    layer = uqff.deserialize(BLOBS["gguf-bias"])
    other = torch.tensor([7.0, 8.0], dtype=torch.float64)
    assert uqff.serialize(layer) == BLOBS["gguf-bias"]
    assert uqff.deserialize(uqff.serialize(layer, other)) == Layer(layer.weight, other)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool, torch.float8_e5m2])
def test_dtype_without_code_is_refused(dtype: torch.dtype) -> None:
    """Ten dtypes can be stored."""
    weight = uqff.deserialize(BLOB).weight
    with pytest.raises(UnsupportedError, match="dtype has no code"):
        uqff.serialize(weight, torch.zeros(2).to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Buffers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOBS)
def test_every_kind_of_buffer(name: str, tmp_path: Path) -> None:
    """Bytes are bytes, whoever holds them, read-only or not, and at whatever address they begin."""
    blob = BLOBS[name]
    expected = uqff.deserialize(blob)
    (tmp_path / "blob").write_bytes(blob)
    with open(tmp_path / "blob", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(blob, np.uint8)
    buffers = [bytearray(blob), memoryview(blob), memoryview(bytearray(blob)), mapped, array, array.copy()]
    buffers += [array.reshape(1, -1), array.view(np.int8), memoryview(blob).cast("c")]
    buffers += [memoryview(b"x" * shift + blob)[shift:] for shift in range(1, 9)]
    for buffer in buffers:
        layer = uqff.deserialize(buffer)
        assert layer == expected
        assert uqff.serialize(layer) == blob


@pytest.mark.parametrize(
    "buffer",
    [memoryview(BLOB * 2)[::2], np.zeros((4, 4), np.uint8)[:, :2], np.zeros(3, "M8[s]"), None, 3, "text", [1, 2]],
    ids=["strided", "columns", "dates", "none", "int", "str", "list"],
)
def test_not_a_contiguous_buffer(buffer: object) -> None:
    """What cannot be seen as a row of bytes without a copy is refused by name."""
    for reader in (uqff.deserialize, trace):
        with pytest.raises(FormatError, match="not a contiguous bytes-like object") as caught:
            reader(buffer)
        assert caught.value.got == type(buffer).__name__


def payload_pointers(layer: Layer) -> list[int]:
    """Addresses of the large parts."""
    names = ("data", "w_q", "weight", "blocks")
    return [part.array().ctypes.data for name, part in layer.weight.parts.items() if name in names]


@pytest.mark.parametrize("name", BLOBS)
@pytest.mark.parametrize("shift", range(8))
def test_payload_is_a_view_at_any_address(name: str, shift: int) -> None:
    """Payload tensors share the buffer's memory, aligned or not; nothing is copied but small parts."""
    buffer = bytearray(shift) + bytearray(BLOBS[name])
    view = memoryview(buffer)[shift:]
    begin = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    (pointer,) = payload_pointers(uqff.deserialize(view))
    assert begin <= pointer < begin + len(view)
    data = next(field for field in trace(view) if field.path.endswith("data"))
    assert pointer == begin + data.offset


@pytest.mark.parametrize("name", BLOBS)
@pytest.mark.parametrize("shift", range(4))
def test_record_at_any_address_is_the_same_value(name: str, shift: int) -> None:
    """Parts that are kept as bytes because they lie unaligned behave as tensors do."""
    layer = uqff.deserialize(memoryview(bytes(shift) + BLOBS[name])[shift:])
    weight = uqff.deserialize(BLOBS[name]).weight
    assert layer.weight == weight
    assert copy.deepcopy(layer) == layer
    assert dataclasses.replace(layer.weight) == weight  # type: ignore[type-var]
    assert repr(layer.weight) == repr(weight)
    meta = layer.weight.to("meta")
    assert (meta.shape, meta.nbytes, meta.kind) == (weight.shape, weight.nbytes, weight.kind)
    assert layer.weight.dequantize().numpy().tobytes() == weight.dequantize().numpy().tobytes()


def test_view_of_a_writable_buffer_shows_its_changes() -> None:
    """A view, not a copy: the proof by writing."""
    buffer = bytearray(BLOBS["gguf"])
    weight = uqff.deserialize(buffer).weight
    assert isinstance(weight, GGUF)
    buffer[-1] ^= 0xFF
    assert int(weight.data[-1, -1]) == buffer[-1]
    with pytest.raises(BufferError):
        buffer.append(0)


def test_record_outlives_the_name_of_its_buffer() -> None:
    """Tensors keep the memory they look into, whoever else lets go."""
    for make in (bytes, bytearray):
        layer = uqff.deserialize(make(BLOBS["gguf-bias"]))
        gc.collect()
        junk = [bytes(len(BLOBS["gguf-bias"])) for _ in range(100)]
        assert uqff.serialize(layer) == BLOBS["gguf-bias"]
        del junk


def test_buffer_is_released_with_the_last_tensor() -> None:
    """No reference cycle keeps gigabytes."""

    class Buffer(np.ndarray):
        pass

    buffer = np.frombuffer(BLOBS["gguf"], np.uint8).copy().view(Buffer)
    gone = weakref.ref(buffer)
    layer = uqff.deserialize(buffer)
    del buffer
    assert gone() is not None
    del layer
    gc.collect()
    assert gone() is None


def test_parsing_fields_does_not_import_torch() -> None:
    """Inspection of a file costs no second and a half of imports."""
    code = (
        "import sys, uqff; from uqff.codec.blob import read_fields, trace; "
        f"read_fields({BLOBS['afq']!r}); trace({BLOBS['hqq']!r}); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Lengths of 4 GiB and more
# ---------------------------------------------------------------------------------------------------------------------


def test_length_that_wraps_is_read_modulo_2_32(tmp_path: Path) -> None:
    """Old writers let the length wrap at 4 GiB: shape and dtype give the size. The file is sparse."""
    size = 2**32 + 64
    cases = {
        "data": header(0) + u32(64) + b"\0" + u32(0, 2, 2**30 // 16 + 1, 16),
        "weight.data": header(1) + b"\0" + u32(64, 0, 2, 2**26 + 1, 64),
    }
    for path, head in cases.items():
        target = tmp_path / path
        target.write_bytes(head)
        with open(target, "r+b") as file:
            file.truncate(len(head) + size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        places = trace(mapped)
        assert (places[-1].path, places[-1].offset, places[-1].size) == (path, len(head), size)
        layer = uqff.deserialize(mapped)
        assert layer.weight.nbytes == size
        with pytest.raises(FormatError, match=r"length does not fit|truncated"):
            read_fields(memoryview(mapped)[: len(head) + 64])
        del layer, places
        target.unlink()


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (GGUF(torch.empty(2**16, 2**16, dtype=torch.uint8, device="meta"), ggml.F32), "data_length"),
        (Unquant(torch.empty(2**16, 2**16, dtype=torch.uint8, device="meta"), DType.F32), "weight.length"),
        (Unquant(torch.empty(2**16 + 1, 2**16, dtype=torch.uint8, device="meta"), DType.U8), "weight.length"),
    ],
)
def test_length_that_would_wrap_is_not_written(record: uqff.QuantizedTensor, field: str) -> None:
    """A file that states a wrong length is not made, by size and by bytes alike."""
    for write in (blob_size, chunks):
        with pytest.raises(FormatError, match="does not fit its field") as caught:
            write(record)
        assert caught.value.field == field


def test_length_just_below_the_limit_is_written() -> None:
    """2**32 - 4 bytes of F32 fit."""
    meta = torch.empty(1, 2**32 - 4, dtype=torch.uint8, device="meta")
    assert blob_size(Unquant(meta, DType.F32)) == 6 + 12 + 8 + 2**32 - 4


def test_latest_is_the_last_version() -> None:
    """The default of ``serialize`` is the newest version there is."""
    assert max(VERSIONS) == LATEST
    assert uqff.serialize(uqff.deserialize(BLOB)) == BLOB


def test_bias_of_a_record_may_be_strided() -> None:
    """A bias need not be contiguous to be written."""
    bias = torch.arange(4, dtype=torch.float32)[::2]
    weight = uqff.deserialize(BLOB).weight
    again = uqff.deserialize(uqff.serialize(weight, bias)).bias
    assert again is not None
    assert again.tolist() == [0.0, 2.0]


def test_trailing_bytes_are_refused() -> None:
    """The engine ignores them; here nothing may hide, and nothing may be lost."""
    for blob in BLOBS.values():
        with pytest.raises(FormatError, match="trailing bytes") as caught:
            uqff.deserialize(blob + b"\0")
        assert caught.value.offset == len(blob)


def test_stale_bias_after_a_cleared_flag_is_trailing() -> None:
    """A flag of 0 with a bias behind it is two contradicting statements."""
    blob = BLOBS["unquant-bias"]
    with pytest.raises(FormatError, match="trailing bytes") as caught:
        uqff.deserialize(blob[:5] + b"\0" + blob[6:])
    assert caught.value.offset == len(blob) - len(BIAS)


def test_random_tensor_covers_every_storable_dtype() -> None:
    """The strategies leave no dtype out (a check of the tests)."""
    for dtype in DType:
        if dtype.storable:
            assert DType.of_torch(random_tensor(1, dtype, (2, 2)).dtype) is dtype
