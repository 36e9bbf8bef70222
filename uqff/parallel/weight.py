"""A quantised weight as a module: its bytes are buffers, so it moves, copies, saves and loads as every module does.

Buffers hold bytes, not numbers: casting a model to another dtype must not touch the scales of a quantised weight.
"""

from __future__ import annotations

from typing import Any

import torch

from uqff.families.base import QuantizedTensor
from uqff.families.part import Part

__all__ = ["StoredWeight"]


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
        self._meta = record.meta()
        self._place = place
        for name, part in record.parts.items():
            self.register_buffer(name, part.as_bytes().tensor())
        self.register_buffer("signature", torch.tensor(list(self._signature().encode()), dtype=torch.uint8))

    def _signature(self) -> str:
        return f"{_signature(self._meta)} {self._place}".rstrip()

    @property
    def record(self) -> QuantizedTensor:
        """The record; its tensors are views of the buffers."""
        parts = {}
        for name, meta in self._meta.parts.items():
            data = self._buffers[name]
            assert data is not None
            parts[name] = Part(meta.dtype, meta.shape, Part.of_tensor(data).data)
        return self._meta.replaced(**parts)

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


def _signature(record: QuantizedTensor) -> str:
    rest = {name: value for name, value in vars(record).items() if name not in record.parts}
    shown = (f"{name}={getattr(value, 'name', value)}" for name, value in rest.items())
    return " ".join([type(record).__name__, f"shape={list(record.shape)}", *shown])
