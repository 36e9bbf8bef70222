"""A quantised weight as a module: its bytes are buffers, so it moves, copies, saves and loads as every module does.

Buffers hold bytes, not numbers: casting a model to another dtype must not touch the scales of a quantised weight.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from uqff.families.base import QuantizedTensor
from uqff.families.parts import Part, StoredTensor, flat_part, own

__all__ = ["StoredWeight", "outline_of"]


class StoredWeight(torch.nn.Module):
    """The parts of a record as uint8 buffers of the same names, views of the record's memory.

    The buffer ``signature`` is a text, as bytes, of everything else that the record is; a state dict fits a module only
    if it is the same.
    """

    def __init__(self, record: QuantizedTensor, place: str = "") -> None:
        """The bytes of a record.

        Args:
            record: what is stored.
            place: which part of a whole it is: the state of one rank does not fit another.
        """
        super().__init__()
        self._outline = outline_of(record)
        self._place = place
        for name, part in record._parts().items():
            self.register_buffer(name, own(flat_part(part)))
        self.register_buffer("signature", torch.tensor(list(self._signature().encode()), dtype=torch.uint8))

    def _signature(self) -> str:
        return f"{_signature(self._outline)} {self._place}".rstrip()

    @property
    def record(self) -> QuantizedTensor:
        """The record; its tensors are views of the buffers."""
        parts: dict[str, Any] = {}
        for name, meta in self._outline._parts().items():
            assert isinstance(meta, torch.Tensor)
            data = self._buffers[name]
            assert data is not None
            if data.data_ptr() % meta.dtype.itemsize == 0:
                parts[name] = data.view(meta.dtype).view(meta.shape)
            elif isinstance(getattr(type(self._outline), name, None), StoredTensor):
                parts[name] = Part(data.view(-1), _stored_dtype(meta), tuple(meta.shape))
            else:
                parts[name] = data.clone().view(meta.dtype).view(meta.shape)
        return replace(self._outline, **parts)  # type: ignore[type-var]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, error_msgs = args
        loaded = state_dict.get(prefix + "signature")
        mine = self._signature()
        if loaded is not None and bytes(loaded.tolist()) != mine.encode():
            theirs = bytes(loaded.tolist()).decode(errors="replace")
            error_msgs.append(f"{prefix.rstrip('.')}: another quantised weight: expected {mine}, got {theirs}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return self._signature()


def outline_of(record: QuantizedTensor) -> QuantizedTensor:
    """The record on the meta device: all sizes, no bytes; touches no payload."""
    parts = {}
    for name, part in record._parts().items():
        dtype = part.dtype.torch if isinstance(part, Part) else part.dtype
        parts[name] = torch.empty(part.shape, dtype=dtype, device="meta")
    return replace(record, **parts)  # type: ignore[type-var]


def _stored_dtype(tensor: torch.Tensor) -> Any:
    from uqff.codes import DType

    return DType.of_torch(tensor.dtype)


def _signature(record: QuantizedTensor) -> str:
    parts = record._parts()
    rest = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in parts}  # type: ignore[arg-type]
    shown = (f"{name}={getattr(value, 'name', value)}" for name, value in rest.items())
    return " ".join([type(record).__name__, f"shape={list(record.shape)}", *shown])
