"""Layers and records as values: equality, copies, pickles, devices, what they say of themselves."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given

import uqff
from tests.support.samples import BLOB, BLOBS
from tests.support.strategies import layers
from uqff import FormatError, Layer
from uqff.codec.blob import blob_size, trace
from uqff.families import Unquant


@given(layers())
def test_layers_can_be_copied_pickled_and_compared(layer: Layer) -> None:
    """Copies are equal and separate; equality is by bytes, so NaN equals itself."""
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other == layer
        assert not (other != layer)  # noqa: SIM202  (tuples have a `!=` of their own)
        assert uqff.serialize(other) == uqff.serialize(layer)
        assert repr(other.weight) == repr(layer.weight)


@given(layers())
def test_parts_are_what_is_stored(layer: Layer) -> None:
    """Buffers first: every part has the bytes of the blob, a torch tensor is a view of them, and both make records."""
    weight, blob = layer.weight, uqff.serialize(layer)
    for name, part in weight.parts.items():
        assert part.array().flags.writeable
        assert part.array().tobytes() in blob
        tensor = getattr(weight, name)
        assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (part.shape, part.dtype.torch, part.nbytes)
        aligned = part.array().ctypes.data % part.dtype.itemsize == 0
        assert (tensor.data_ptr() == part.array().ctypes.data) == aligned
    by_tensors = type(weight)(**{name: getattr(weight, name) for name in vars(weight)})
    assert by_tensors == weight
    assert weight.replaced(**weight.parts) == weight
    assert Layer.of(layer) is layer
    unpacked, bias = layer
    assert unpacked is weight
    assert (bias is None) == (layer.bias_part is None)


@pytest.mark.parametrize("name", [name for name in BLOBS if "bias" not in name])
def test_one_bit_makes_a_record_unequal(name: str) -> None:
    """Every byte of every stored part counts."""
    layer = uqff.deserialize(BLOBS[name])
    for field in trace(BLOBS[name]):
        if not field.path.endswith(("data", "scale")):
            continue
        for at in range(field.offset, field.offset + field.size):
            changed = bytearray(BLOBS[name])
            changed[at] ^= 0x80
            assert uqff.deserialize(changed) != layer
            assert uqff.deserialize(changed).weight != layer.weight


def test_records_of_other_kinds_are_unequal() -> None:
    """No two families, nor a record and something else, are ever equal."""
    records = [
        uqff.deserialize(BLOBS[name]).weight for name in ("gguf", "unquant", "hqq", "fp8", "afq", "f8q8", "mxfp4")
    ]
    for at, one in enumerate(records):
        assert [one == other for other in records] == [at == i for i in range(len(records))]
        assert one != "text"
        assert one != Layer(one)
        assert Layer(one) != (one, None)


def test_bias_counts_in_equality_of_layers() -> None:
    """Same numbers in another dtype are another bias."""
    weight = uqff.deserialize(BLOB).weight
    bias = torch.tensor([1.0, 2.0])
    assert Layer(weight, bias) == Layer(weight, bias.clone())
    assert Layer(weight, bias) != Layer(weight)
    assert Layer(weight) != Layer(weight, bias)
    assert Layer(weight, bias) != Layer(weight, bias.double())
    assert Layer(weight, torch.tensor([0.0, 1.0])) != Layer(weight, torch.tensor([-0.0, 1.0]))


def test_records_are_frozen_and_unhashable() -> None:
    """A record is a value of its bytes; a hash would read gigabytes."""
    layer = uqff.deserialize(BLOBS["afq"])
    for name in ("w_q", "scales", "bits"):
        with pytest.raises(AttributeError):
            setattr(layer.weight, name, None)
    for value in (layer, layer.weight):
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)


@given(layers())
def test_meta_records_have_sizes_but_no_bytes(layer: Layer) -> None:
    """On the meta device sizes are known, bytes are not: no crash, no equality by accident."""
    meta = Layer(layer.weight.to("meta"), None if layer.bias is None else layer.bias.to("meta"))
    assert blob_size(meta) == blob_size(layer)
    assert (meta.weight.shape, meta.weight.kind, meta.weight.nbytes) == (
        layer.weight.shape,
        layer.weight.kind,
        layer.weight.nbytes,
    )
    assert meta.weight.device.type == "meta"
    assert meta.weight != layer.weight
    assert layer.weight != meta.weight
    assert meta.weight == meta.weight
    assert "meta" in repr(meta.weight)
    with pytest.raises(FormatError, match="meta device"):
        uqff.serialize(meta)


@given(layers())
def test_to_moves_every_part_and_stays_if_it_is_there(layer: Layer) -> None:
    """``to`` of the device a record is on is the record itself."""
    assert layer.weight.to("cpu") is layer.weight
    assert layer.weight.to(torch.device("cpu")) is layer.weight


@given(layers())
def test_what_every_record_says_of_itself(layer: Layer) -> None:
    """Family, kind, shape, nbytes, numel and repr agree with the blob."""
    weight = layer.weight
    blob = uqff.serialize(weight)
    payload = sum(f.size for f in trace(blob) if f.path.endswith(("data", "scale")))
    assert weight.nbytes == payload
    assert weight.numel == int(np.prod(weight.shape))
    assert weight.device == torch.device("cpu")
    assert repr(weight) == (
        f"<{type(weight).__name__} {weight.kind} {list(weight.shape)}, {weight.nbytes:,} bytes, "
        f"{8 * weight.nbytes / weight.numel:.2f} bits/weight, cpu>"
    )


@given(layers())
def test_dequantize_gives_the_shape_in_the_dtype_and_leaves_the_record(layer: Layer) -> None:
    """A new tensor of the logical shape, cast from float32; the record's bytes stay as they were."""
    before = uqff.serialize(layer)
    full = layer.weight.dequantize()
    assert full.dtype is torch.float32
    assert tuple(full.shape) == layer.weight.shape
    half = layer.weight.dequantize(torch.bfloat16)
    assert half.dtype is torch.bfloat16
    number = ~full.isnan()  # which NaN a cast gives is nobody's promise
    assert torch.equal(half.isnan(), ~number)
    assert torch.equal(half.view(torch.int16)[number], full.to(torch.bfloat16).view(torch.int16)[number])
    full.fill_(1)
    assert uqff.serialize(layer) == before


def test_repr_of_a_record_without_weights() -> None:
    """A debugger shows what cannot be stored, too."""
    assert repr(Unquant.of(torch.empty(0, 4))) == "<Unquant unquant [0, 4], 0 bytes, 0.00 bits/weight, cpu>"


def test_readers_in_many_threads() -> None:
    """Parsing has no shared state."""
    expected = {name: uqff.deserialize(blob) for name, blob in BLOBS.items()}
    wrong: list[str] = []

    def read() -> None:
        for _ in range(20):
            wrong.extend(n for n, b in BLOBS.items() if uqff.deserialize(b) != expected[n] or not trace(b))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
