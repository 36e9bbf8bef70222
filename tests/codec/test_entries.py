"""1.x layers as entries: every family both ways, the same record as the blob of the same parts, every rule by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.support.samples import BLOBS
from tests.support.samples_v1 import BIAS, LAYERS, Tensor, byte, dims, number
from tests.support.strategies import layers
from uqff import DType, FormatError, Layer, ShapeError, UnsupportedError, UqffError, Version
from uqff.codec.entries import from_entries, read_fields, suffixes, to_entries
from uqff.codes import ENTRY_VERSIONS
from uqff.families import FAMILIES, HQQ, Unquant
from uqff.schema.entries import Entries, Entry, RawTensor

OLDEST = Version(1, 0, 0)
STACKABLE = {"GGUF", "Unquant", "AFQ", "MXFP4"}


def raw(entries: dict[str, Tensor]) -> dict[str, RawTensor]:
    """Hand-written entries as the library takes them."""
    return {suffix: RawTensor(dtype, shape, memoryview(data)) for suffix, (dtype, shape, data) in entries.items()}


def plain(entries: dict[str, RawTensor]) -> dict[str, Tensor]:
    """The reverse of :func:`raw`."""
    return {suffix: (e.dtype, e.shape, bytes(memoryview(e.data).cast("B"))) for suffix, e in entries.items()}


def versions_of(layer: Layer) -> list[Version]:
    """The versions that can express a layer."""
    versions = list(ENTRY_VERSIONS)
    if isinstance(layer.weight, Unquant):
        versions.remove(OLDEST)
    if len(layer.weight.shape) > 2 and layer.weight.family.title not in STACKABLE:
        versions.remove(Version(1, 2, 0))
    return versions


@pytest.mark.parametrize("name", LAYERS)
def test_both_generations_hold_the_same_record(name: str) -> None:
    """``from_entries(to_entries(r)) == r``, the entries are those written by hand, and the blob has the same parts."""
    made = from_entries(raw(LAYERS[name]))
    assert made == uqff.deserialize(BLOBS[name])
    written = to_entries(made)
    assert plain(written) == LAYERS[name]
    assert list(written) == list(LAYERS[name])
    assert torch.equal(
        made.weight.dequantize().view(torch.int32), uqff.deserialize(BLOBS[name]).weight.dequantize().view(torch.int32)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_verbs_of_the_record(name: str) -> None:
    """``from_entries`` and ``to_entries`` of the family do without ``weight.format`` and know no bias."""
    entries = raw({suffix: tensor for suffix, tensor in LAYERS[name].items() if suffix != "weight.format"})
    record = FAMILIES[LAYERS[name]["weight.format"][2][0]]
    weight = record.from_entries(entries)
    assert type(weight) is record
    assert plain(weight.to_entries()) == plain(entries)


@pytest.mark.parametrize("name", LAYERS)
def test_bias(name: str) -> None:
    """Any layer may have one, in any storable dtype; it is the last entry."""
    entries = {**LAYERS[name], "bias": BIAS}
    made = from_entries(raw(entries))
    assert made.bias is not None
    assert made.bias.tolist() == [0.5, -2.0]
    assert plain(to_entries(made)) == entries
    assert list(to_entries(made))[-1] == "bias"


@given(layers(), st.data())
def test_round_trip(layer: Layer, data: st.DataObject) -> None:
    """Any layer of any bits survives in every version that can express it; sizes are known without payloads."""
    version = data.draw(st.sampled_from(versions_of(layer)))
    entries = to_entries(layer, version)
    assert from_entries(entries, version) == layer
    assert plain(to_entries(from_entries(entries, version), version)) == plain(entries)
    blank = Layer(layer.weight.to("meta"), None if layer.bias is None else layer.bias.to("meta"))
    sizes = {suffix: (e.dtype, e.shape, e.data.nbytes) for suffix, e in to_entries(blank, version).items()}
    assert sizes == {suffix: (e.dtype, e.shape, e.data.nbytes) for suffix, e in entries.items()}


def test_read_only_bytes_are_viewed_not_copied() -> None:
    """A payload is a view of the entry."""
    data = bytearray(LAYERS["mxfp4"]["weight"][2])
    entries = raw(LAYERS["mxfp4"]) | {"weight": RawTensor("U8", (2, 16), memoryview(data))}
    weight = from_entries(entries).weight
    data[0] ^= 0xFF
    assert plain(to_entries(weight))["weight"][2] == bytes(data)


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name in LAYERS for suffix in LAYERS[name]])
def test_missing_companion(name: str, suffix: str) -> None:
    """Every entry is needed, and named if it is not there."""
    entries = {s: tensor for s, tensor in LAYERS[name].items() if s != suffix}
    with pytest.raises(FormatError, match="missing entry") as caught:
        from_entries(raw(entries))
    assert caught.value.field == suffix
    assert caught.value.got == "no such entry"
    assert str(caught.value.expected).startswith(("U", "F", "any"))


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name in LAYERS for suffix in LAYERS[name]])
@pytest.mark.parametrize("dtype", ["I64", "F64", "BOOL", "U16", "I8"])
def test_wrong_dtype(name: str, suffix: str, dtype: str) -> None:
    """Of every entry, with the entry's name; an unquantised weight alone may have any storable dtype."""
    _, shape, _ = LAYERS[name][suffix]
    count = int(torch.empty(shape).numel())
    size = {"I64": 8, "F64": 8, "BOOL": 1, "U16": 2, "I8": 1}[dtype]
    entries = {**LAYERS[name], suffix: (dtype, shape, bytes(count * size))}
    if (name, suffix) == ("unquant", "weight") and dtype in ("I64", "F64"):
        assert from_entries(raw(entries)).weight.shape == (2, 3)
        return
    with pytest.raises(FormatError, match=r"wrong dtype|not a number of one byte") as caught:
        from_entries(raw(entries))
    assert caught.value.field == suffix


@pytest.mark.parametrize(
    ("name", "suffix"), [(name, suffix) for name in LAYERS for suffix in LAYERS[name] if name != "unquant"]
)
def test_wrong_rank(name: str, suffix: str) -> None:
    """A number is no list of one, a row is no matrix, and where any rank will do, the companions must have it too."""
    dtype, shape, data = LAYERS[name][suffix]
    entries = {**LAYERS[name], suffix: (dtype, (1, *shape), data)}
    with pytest.raises(FormatError) as caught:
        from_entries(raw(entries))
    assert caught.value.problem in (
        "wrong rank",
        "not a number of one byte",
        "shape does not fit w_q",
        "shape does not fit blocks",
        "stacked FP8 weights no longer exist",
    )


def test_stacked_unquant_is_no_wrong_rank() -> None:
    """The near miss of the rule above."""
    dtype, shape, data = LAYERS["unquant"]["weight"]
    entries = raw({**LAYERS["unquant"], "weight": (dtype, (1, *shape), data)})
    assert from_entries(entries).weight.shape == (1, 2, 3)


BROKEN: list[tuple[str, dict[str, Tensor], type[UqffError], str, str]] = [
    ("gguf", {"weight.format": byte(7)}, UnsupportedError, "unknown type", "weight.format"),
    ("gguf", {"weight.dtype": number(5)}, FormatError, "unknown ggml type", "weight.dtype"),
    ("gguf", {"weight.shape": dims(2, 33)}, FormatError, "row is not whole blocks", "weight.shape"),
    ("gguf", {"weight.shape": dims()}, FormatError, "weight without dimensions", "weight.shape"),
    ("gguf", {"weight.shape": dims(0, 32)}, FormatError, "empty dimension", "weight.shape"),
    ("gguf", {"weight.shape": dims(*[1] * 8, 64)}, FormatError, "too many dimensions", "weight.shape"),
    ("gguf", {"weight": ("U8", (37,), bytes(37))}, FormatError, "payload has the wrong size", "weight"),
    ("gguf", {"weight": ("U8", (0,), b"")}, FormatError, "payload has the wrong size", "weight"),
    ("gguf", {"weight.zeros": byte(0)}, FormatError, "not an entry of GGUF layers", "weight.zeros"),
    ("gguf", {"bias": ("F32", (3,), bytes(12))}, ShapeError, "bias does not fit weight", "bias"),
    ("gguf", {"bias": ("F32", (), bytes(4))}, ShapeError, "bias does not fit weight", "bias"),
    ("unquant", {"weight": ("F32", (0, 2), b"")}, FormatError, "empty dimension", "weight"),
    ("unquant", {"weight": ("F32", (), bytes(4))}, FormatError, "wrong rank", "weight"),
    ("unquant", {"weight.bits": byte(4)}, FormatError, "not an entry of Unquant layers", "weight.bits"),
    ("hqq", {"weight.bits": byte(5)}, FormatError, "value out of range", "weight.bits"),
    ("hqq", {"weight.axis": byte(2)}, FormatError, "value out of range", "weight.axis"),
    ("hqq", {"weight.group_size": number(0)}, FormatError, "value out of range", "weight.group_size"),
    ("hqq", {"weight.group_size": number(3)}, FormatError, "weight is not whole groups", "weight.group_size"),
    ("hqq", {"weight.round_zeros": byte(2)}, FormatError, "value out of range", "weight.round_zeros"),
    ("hqq", {"weight.bits": byte(3)}, FormatError, "wrong dtype", "weight"),
    ("hqq", {"weight.zeros": ("F16", (1, 2), bytes(4))}, FormatError, "wrong dtype", "weight.zeros"),
    ("hqq", {"weight.scales": ("F32", (2, 1), bytes(8))}, FormatError, "shape does not fit", "weight.scales"),
    ("hqq", {"weight.shape": dims(1, 2, 4)}, FormatError, "stacked HQQ weights no longer exist", "weight"),
    ("fp8", {"weight.dtype": number(6)}, FormatError, "value out of range", "weight.dtype"),
    ("fp8", {"weight": ("F8_E4M3", (1, 2, 3), bytes(6))}, FormatError, "stacked FP8 weights", "weight"),
    ("afq", {"weight.bits": byte(5)}, FormatError, "value out of range", "weight.bits"),
    ("afq", {"weight.group_size": byte(16)}, FormatError, "value out of range", "weight.group_size"),
    ("afq", {"weight.biases": ("F16", (2, 1), bytes(4))}, FormatError, "wrong dtype", "weight.biases"),
    ("afq", {"weight.scales": ("F32", (1, 2), bytes(8))}, FormatError, "shape does not fit w_q", "weight.scales"),
    ("f8q8", {"weight.num_blocks": number(1)}, FormatError, "payload has the wrong size", "weight"),
    ("f8q8", {"weight.shape": dims(2, 40)}, FormatError, "block count does not fit shape", "weight.num_blocks"),
    ("f8q8", {"weight.shape": dims(2, 2, 10)}, FormatError, "stacked F8Q8 weights", "weight"),
    ("mxfp4", {"weight": ("U8", (2, 15), bytes(30))}, FormatError, "row is not whole blocks", "weight"),
    ("mxfp4", {"weight.scales": ("U8", (1, 2), bytes(2))}, FormatError, "shape does not fit", "weight.scales"),
]


@pytest.mark.parametrize(("name", "change", "error", "problem", "field"), BROKEN)
def test_every_rule(name: str, change: dict[str, Tensor], error: type[UqffError], problem: str, field: str) -> None:
    """One broken entry a rule; the error names the entry, not the field of the blob."""
    with pytest.raises(UqffError) as caught:
        from_entries(raw({**LAYERS[name], **change}))
    assert caught.value.problem.startswith(problem)
    assert caught.value.field == field
    assert type(caught.value) is error


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, c, _, p, _ in BROKEN if p.startswith("stacked")])
def test_stacked_until_1_1(name: str, change: dict[str, Tensor]) -> None:
    """What 1.1 wrote is read; 1.2 refuses it, to write as to read."""
    entries = raw({**LAYERS[name], **change})
    for version in ((1, 0, 0), (1, 1, 0)):
        layer = from_entries(entries, version)
        assert len(layer.weight.shape) == 3
        assert plain(to_entries(layer, version)) == plain(entries)
    with pytest.raises(UnsupportedError, match="stacked"):
        to_entries(layer, (1, 2, 0))


def test_unquant_since_1_1() -> None:
    """1.0 has no such layers."""
    layer = from_entries(raw(LAYERS["unquant"]), (1, 1, 0))
    with pytest.raises(FormatError, match="Unquant layers did not exist yet") as caught:
        from_entries(raw(LAYERS["unquant"]), (1, 0, 3))
    assert caught.value.field == "weight.format"
    with pytest.raises(UnsupportedError, match="Unquant layers did not exist yet"):
        to_entries(layer, (1, 0, 0))


@pytest.mark.parametrize("version", [(1, 2, 1), (1, 3, 0), (2, 0, 0), (0, 2, 0)])
def test_version_to_write(version: tuple[int, int, int]) -> None:
    """Only versions that exist are written."""
    with pytest.raises(UnsupportedError, match="unknown version"):
        to_entries(from_entries(raw(LAYERS["gguf"])), version)


def test_inconsistent_record_is_not_written() -> None:
    """The rules of reading hold for writing."""
    weight = HQQ(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(1, 3), torch.zeros(1, 2), (2, 4), 4, 4)
    with pytest.raises(FormatError, match="shape does not fit weight and groups") as caught:
        weight.to_entries()
    assert caught.value.field == "weight.scales"
    fitting = from_entries(raw(LAYERS["gguf"])).weight
    with pytest.raises(ShapeError, match="bias does not fit weight") as shape:
        to_entries(Layer(fitting, torch.zeros(3)))
    assert shape.value.field == "bias"
    with pytest.raises(UnsupportedError, match="dtype has no code"):
        to_entries(Layer(fitting, torch.zeros(2, dtype=torch.bool)))


@given(layers(), st.data())
def test_mutated_entries_give_a_layer_or_an_error(layer: Layer, data: st.DataObject) -> None:
    """Other bytes, dtypes and shapes: a valid layer, or a UqffError that names an entry; nothing else."""
    entries = to_entries(layer, (1, 1, 0))
    suffix = data.draw(st.sampled_from(sorted(entries)))
    dtype = data.draw(st.sampled_from([d for d in DType if d.storable]))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
    size = math.prod(shape) * dtype.itemsize
    content = bytes(data.draw(st.integers(0, 255)) for _ in range(min(size, 4))).ljust(size, b"\0")
    entries[suffix] = RawTensor(dtype.safetensors, shape, memoryview(content))
    field = None
    try:
        read = from_entries(entries, (1, 1, 0))
    except UqffError as error:
        field = error.field
    assert field in suffixes() or (field is None and plain(to_entries(read, (1, 1, 0))) == plain(entries))


def test_fields_have_the_names_of_the_layout() -> None:
    """What the pre-1.0 reader gives, less lengths and counts: one set of rules serves both."""
    for name, entries in LAYERS.items():
        record, fields = read_fields(raw(entries))
        _, of_blob = uqff.codec.blob.read_fields(BLOBS[name])
        shared: dict[str, Any] = {
            k: v for k, v in of_blob.items() if k in fields and k not in ("version", "quant_type")
        }
        for field, value in shared.items():
            other = {k: v for k, v in value.items() if k in fields[field]} if isinstance(value, dict) else value
            assert fields[field] == other, (name, field)
        assert set(of_blob) - set(fields) <= {"ndim", "bias_flag", "data_length"}
        assert record.parse(fields) == record.parse(of_blob)


def test_declarations_are_checked_against_the_layout() -> None:
    """A declaration that contradicts the layout does not come into being."""
    good = Entry("weight", "weight", (DType.F8E4M3,), ("...", "in"))
    layout = FAMILIES[3].LAYOUT
    Entries(layout, good)
    for wrong in (
        Entry("weight.dtype", "dtype", (DType.U8,)),
        Entry("weight.dtype", "dtype", (DType.U32,), ("1",)),
        Entry("weight.quant_scale", "quant_scale", (DType.F64,)),
    ):
        with pytest.raises(TypeError, match="another type or rank"):
            Entries(layout, good, wrong)
    with pytest.raises(TypeError, match="no weight"):
        Entries(layout, Entry("weight.dtype", "dtype", (DType.U32,)))
