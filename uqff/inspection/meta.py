"""What a layer is, from its parsed fields alone: type, logical shape, stored bytes. No tensor is made."""

from __future__ import annotations

import math
from typing import NamedTuple

from uqff.codes import DType, Family, Version
from uqff.container import UqffFile
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope

__all__ = ["LayerMeta", "read_meta"]


class LayerMeta(NamedTuple):
    """A valid layer in numbers.

    Attributes:
        version: of its blob.
        family: of its blob.
        kind: short name of its type, as :attr:`QuantizedTensor.kind`.
        shape: logical dimensions of the weight, in elements.
        payload_bytes: bytes of the stored weight, without framing and bias, as :attr:`QuantizedTensor.nbytes`.
        bias: dtype and shape of the bias, if there is one.
        record: the class of its record.
        fields: all fields by name.
    """

    version: Version
    family: Family
    kind: str
    shape: tuple[int, ...]
    payload_bytes: int
    bias: tuple[DType, tuple[int, ...]] | None
    record: type[QuantizedTensor]
    fields: Scope

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def read_meta(file: UqffFile, key: str, *, trace: list[FieldTrace] | None = None) -> LayerMeta:
    """Parse and validate a layer without touching its payload.

    Args:
        file: an open model.
        key: key of a layer in it.
        trace: a list that receives every field with its place in the blob; on an error, those before the broken one.

    Raises:
        UqffError: the blob breaks a rule, among them that the bias must fit the weight; file, layer, field and offset
            in the file are named.
    """
    record, fields = file.fields(key, trace=trace)
    weight, bias = record.parse(fields), fields["bias"]
    return LayerMeta(
        version=fields["version"],
        family=record.family,
        kind=weight.kind,
        shape=weight.shape,
        payload_bytes=weight.nbytes,
        bias=None if bias is None else (bias["dtype"], tuple(bias["shape"])),
        record=record,
        fields=fields,
    )
