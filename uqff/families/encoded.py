"""A weight as the fields of its format: what a record is before torch has a part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family
from uqff.schema.buffers import writable_alias

if TYPE_CHECKING:
    from uqff.families.base import QuantizedTensor
    from uqff.schema.bricks import Scope
    from uqff.schema.entries import RawTensor

__all__ = ["Encoded"]


class Encoded(NamedTuple):
    """The fields of a weight, and the class of its record.

    Quantisers make it, kernels read it and writers write it, none of which needs torch: importing that takes 1.3 s, as
    long as it takes to quantise a model of 250 million weights, and 190 MiB.

    Attributes:
        record: class of the record.
        fields: by the names of its layout, without header and bias.
    """

    record: type[QuantizedTensor]
    fields: Scope

    @property
    def family(self) -> Family:
        """Which of the seven families."""
        return self.record.family

    @property
    def kind(self) -> str:
        """See :attr:`QuantizedTensor.kind`."""
        return self.record.kind_of(self.fields)

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`QuantizedTensor.shape`."""
        return self.record.shape_of(self.fields)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def payload(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a field that is a tensor or a payload, uint8 ``[n]``; a view, not to be written to.

        Its array counts as writable: numba tells read-only ones apart, and would compile kernels again for them.
        """
        value = self.fields[name]
        data = value["data"] if isinstance(value, Mapping) else value
        return np.frombuffer(writable_alias(data), np.uint8)

    def to_entries(self) -> dict[str, RawTensor]:
        """See :meth:`QuantizedTensor.to_entries`."""
        return self.record.entries_of(self.fields)

    def as_record(self) -> QuantizedTensor:
        """The record; its tensors are views of the fields, on the meta device where these are placeholders."""
        return self.record.parse(self.fields)

    def write_float32(self, out: npt.NDArray[np.float32]) -> None:
        """Dequantise into ``out``, float32 ``[numel]``, contiguous.

        A kernel does it; where there is none (small weights, no numba) the reference does, which imports torch.
        """
        from uqff import simd

        if simd.decode(self, out.view(np.uint8), DType.F32):
            return
        import torch

        self.as_record().dequantize(out=torch.from_numpy(out).view(self.shape))
