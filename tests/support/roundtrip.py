"""The one helper that asserts both directions at once."""

from __future__ import annotations

import torch

import uqff
from uqff import Layer, Version
from uqff.codec.blob import LATEST, blob_size, trace
from uqff.families.part import Part


def assert_both_ways(layer: Layer, version: Version = LATEST) -> bytes:
    """``parse(build(r)) == r`` and ``build(parse(b)) == b``; the size is known beforehand; every byte has a field.

    Returns:
        The blob.
    """
    blob = uqff.serialize(layer, version=version)
    assert blob_size(layer, version=version) == len(blob)
    parsed = uqff.deserialize(blob)
    assert parsed == layer
    assert uqff.serialize(parsed, version=version) == blob
    assert_tiled(blob)
    return blob


def assert_rebuilds(blob: bytes) -> Layer:
    """``build(parse(b)) == b`` for bytes from elsewhere.

    Returns:
        The layer.
    """
    layer = uqff.deserialize(blob)
    version: Version = trace(blob)[0].value
    assert uqff.serialize(layer, version=version) == blob
    return layer


def assert_tiled(blob: bytes) -> None:
    """The fields of the trace cover the blob without overlap or hole."""
    at = 0
    for field in trace(blob):
        assert field.offset == at, field
        assert field.size > 0, field
        at += field.size
    assert at == len(blob)


def same_bytes(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and bits, or there are none."""
    if a is None or b is None:
        return a is b
    return Part.of_tensor(a).same_as(Part.of_tensor(b))
