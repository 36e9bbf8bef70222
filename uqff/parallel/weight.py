"""A weight as a module: its parts are buffers, so it moves, copies, saves and loads as every module does.

The buffers of a quantised weight hold bytes, not numbers: casting a model to another dtype must not touch its scales,
nor the bias beside it.  A layer that is not quantised is one of plain numbers, weight and bias, and is
cast like any other.

A weight becomes numbers in an operator, ``uqff::dequantize``: one node to ``torch.compile`` and ``torch.export``, which
need not see how it is done.  Those that multiply are in :mod:`uqff.parallel.product`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch

from uqff.checkpoints.methods import FOREIGN
from uqff.codes import DType
from uqff.families import FAMILIES, QuantizedTensor, Unquant
from uqff.families.gguf.blocks import BlockType, block_type_of_code
from uqff.families.part import Part

__all__ = ["WeightBuffers", "dequantize", "of_spec", "record_of_bytes", "to_spec"]


class WeightBuffers(torch.nn.Module):
    """The parts of a record as uint8 buffers of the same names, views of the record's memory.

    Plain numbers are one buffer ``data`` of their own dtype, which ``.half()`` and ``.to(dtype)`` change.

    The buffer ``signature`` is a text, as bytes, of everything else that the record is; a state dict fits a module only
    if it is the same.

    Attributes:
        shape: of the weight.
    """

    def __init__(self, record: QuantizedTensor, place: str = "", *, numbers: bool = False) -> None:
        """The parts of a record.

        Args:
            record: the weight.
            place: which part of a whole it is: the state of one rank does not fit another.
            numbers: whether a record of plain numbers is cast with the module: that of a layer that is not quantised.
                The numbers are copied if they are not aligned.
        """
        super().__init__()
        self._meta = record.meta()
        self._names = tuple(record.parts)  # torch.compile of torch 2.11 cannot read them off the record
        self._place = place
        self._numbers = numbers and record.plain is not None
        self._spec = to_spec(self._meta)
        self.shape = record.shape
        if self._numbers and record.plain is not None:
            self.register_buffer("data", record.plain.tensor())
        else:
            for name, part in record.parts.items():
                self.register_buffer(name, part.as_bytes().tensor())
        self.register_buffer("signature", torch.tensor(list(self._signature().encode()), dtype=torch.uint8))

    def _signature(self) -> str:
        shown = f"numbers shape={list(self.shape)}" if self._numbers else _signature(self._meta)
        return f"{shown} {self._place}".rstrip()

    @property
    def record(self) -> QuantizedTensor:
        """The record; its tensors are views of the buffers."""
        return Unquant.of(self.get_buffer("data")) if self._numbers else record_of_bytes(self._meta, self.bytes())

    @property
    def numbers(self) -> torch.Tensor | None:
        """The numbers of a layer that is not quantised; None of one that is."""
        return self.get_buffer("data") if self._numbers else None

    def bytes(self) -> list[torch.Tensor]:
        """The bytes of all parts, in their order, as operators take them."""
        if self._numbers:
            return [self.get_buffer("data").view(torch.uint8)]
        return [self.get_buffer(name) for name in self._names]

    def addresses(self) -> list[int]:
        """Where the bytes of all parts begin."""
        buffers: Any = self._buffers
        return [buffers[name].data_ptr() for name in (("data",) if self._numbers else self._names)]

    @property
    def spec(self) -> str:
        """What else the weight is, as operators take it: see :func:`to_spec`."""
        return to_spec(Unquant.of(self.get_buffer("data").to("meta"))) if self._numbers else self._spec

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as numbers of a dtype, without gradients; the buffer itself if it holds just those."""
        made: torch.Tensor = (
            self.get_buffer("data").to(dtype) if self._numbers else dequantize(self.bytes(), self._spec, dtype)
        )
        return made

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


def record_of_bytes(meta: QuantizedTensor, buffers: Sequence[torch.Tensor]) -> QuantizedTensor:
    """The record of the bytes of all parts, in their order; views."""
    parts = {
        name: Part(part.dtype, part.shape, Part.of_tensor(data).data)
        for (name, part), data in zip(meta.parts.items(), buffers, strict=True)
    }
    return meta.replaced(**parts)


_SPECS: Final[dict[str, QuantizedTensor]] = {}
"""What texts of this process stand for: families of others may have fields that no text can hold."""


def to_spec(meta: QuantizedTensor) -> str:
    """All of a record but its bytes as a text, which an exported program keeps; see :func:`of_spec`."""
    rest = {name: _marked(value) for name, value in vars(meta).items() if name not in meta.parts}
    parts = {name: [part.dtype.code, list(part.shape)] for name, part in meta.parts.items()}
    spec = json.dumps({"record": type(meta).__name__, "parts": parts, "rest": rest}, default=repr)
    _SPECS.setdefault(spec, meta)
    return spec


def of_spec(spec: str) -> QuantizedTensor:
    """The record without bytes that a text of :func:`to_spec` stands for; in another process, of our own classes."""
    return _SPECS[spec] if spec in _SPECS else _read_spec(spec)


_RECORD: Final = "class"


@cache
def _read_spec(spec: str) -> QuantizedTensor:
    found = json.loads(spec)
    record = _class_of(found["record"])
    parts = {name: Part.planned(shape, _known(DType.of_code(code))) for name, (code, shape) in found["parts"].items()}
    return record.made_of(**parts, **{name: _unmarked(value) for name, value in found["rest"].items()})


def _marked(value: Any) -> Any:
    if isinstance(value, (DType, BlockType)):
        return {type(value).__name__: value.code}
    if isinstance(value, type):
        return {_RECORD: value.__name__}
    return [_marked(each) for each in value] if isinstance(value, tuple) else value


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        ((name, code),) = value.items()
        if name == _RECORD:
            return _class_of(code)
        return DType.of_code(code) if name == DType.__name__ else block_type_of_code(code)
    return tuple(map(_unmarked, value)) if isinstance(value, list) else value


def _class_of(name: str) -> type[QuantizedTensor]:
    return next(each for each in (*FAMILIES, *FOREIGN) if each.__name__ == name)


def _known(dtype: DType | None) -> DType:
    assert dtype is not None
    return dtype


_SCHEMA = "(Tensor[] parts, str spec, ScalarType dtype) -> Tensor"
"""Given, because torch 2.4 cannot read it off annotations that are text, as all are here."""


@torch.library.custom_op("uqff::dequantize", mutates_args=(), schema=_SCHEMA)
def dequantize(parts: Sequence[torch.Tensor], spec: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight as numbers.

    Args:
        parts: the bytes of its parts, in the order of the record.
        spec: what else it is, see :func:`to_spec`.
        dtype: of the result.
    """
    record = record_of_bytes(of_spec(spec), parts)
    # Plain numbers are cast as they are: float64 would not come through float32.
    return record.dequantize(dtype) if record.plain is None else record.plain.tensor().to(dtype, copy=True)


@dequantize.register_fake
def _(parts: Sequence[torch.Tensor], spec: str, dtype: torch.dtype) -> torch.Tensor:
    return parts[0].new_empty(of_spec(spec).shape, dtype=dtype)
