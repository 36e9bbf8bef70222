"""Stacks: the matrices of several experts as one weight ``[experts, out, in]``, and a stack as its matrices.

What is stored of each expert follows that of the one before.  Families whose rows begin anew with every matrix always
stack; the others where it is exact:

* FP8: one scale belongs to the whole tensor, so all experts must have the same.
* HQQ, axis 0: a column of the stack runs through all experts, so their scales and zeros must be the same, and the stack
  has groups as many times larger.  On axis 1 every stack is exact.
* F8Q8: the last block of each expert must be full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

from uqff.errors import ShardError
from uqff.families.part import stacked

if TYPE_CHECKING:
    from uqff.families.base import QuantizedTensor

__all__ = ["check_shared", "odd_ones", "stack", "stack_parts", "unstack_parts"]

_Record = TypeVar("_Record", bound="QuantizedTensor")

NAMED = 8
"""Experts that an error names."""


def stack(records: Sequence[_Record]) -> _Record:
    """Several weights as one with a dimension in front, which is their number.

    ``stack(r).dequantize()[i]`` has the bits of ``r[i].dequantize()``; the inverse is
    :meth:`~uqff.families.base.QuantizedTensor.unstack`.  Works on the meta device, where values that
    would have to be equal are taken to be.

    Args:
        records: of one type, shape and parameters, on one device.

    Raises:
        ShardError: there are none, some are unlike the others (they are named by their index), or a stack would not be
            exact (see the module).
    """
    if not records:
        raise ShardError("no weights to stack", expected="at least 1", got=0)
    forms = [_form(record) for record in records]
    odd = odd_ones(forms)
    if odd:
        usual = next(form for i, form in enumerate(forms) if i not in odd)
        raise _unlike(odd, forms[odd[0]], usual, len(records))
    devices = [record.place for record in records]
    odd = odd_ones(devices)
    if odd:
        raise _unlike(odd, devices[odd[0]], next(d for i, d in enumerate(devices) if i not in odd), len(records))
    cls = type(records[0])
    cls.check_stack(records)
    return cls._stack(list(records))


def stack_parts(records: list[_Record], *names: str) -> _Record:
    """Stack the named parts; everything else is the same in all records, and is kept."""
    return records[0].replaced(**{name: stacked([record.parts[name] for record in records]) for name in names})


def unstack_parts(record: _Record, *names: str) -> _Record:
    """The one weight of a stack of one: the named parts without their first dimension."""
    return record.replaced(**{name: record.parts[name].view(record.parts[name].shape[1:]) for name in names})


def check_shared(records: Sequence[_Record], *names: str) -> None:
    """Make sure that parts are the same, bit for bit, in all records; those on the meta device are.

    Raises:
        ShardError: naming the part and the records that have another.
    """
    for name in names:
        parts = [record.parts[name] for record in records]
        if any(part.is_planned for part in parts):
            continue
        odd = odd_ones([part.array().tobytes() for part in parts])
        if odd:
            raise ShardError(
                f"weights do not stack: {records[0].kind} has one {name} for all",
                field=name,
                expected=f"the same in all {len(records)}",
                got=f"another in {_named(odd)}",
            )


def odd_ones(values: Sequence[Hashable]) -> list[int]:
    """The places of the values that are not the most frequent one (of equally frequent ones, the first)."""
    usual = Counter(values).most_common(1)[0][0]
    return [i for i, value in enumerate(values) if value != usual]


def _form(record: QuantizedTensor) -> str:
    """Everything that records of a stack have in common, in words."""
    parts = record.parts
    dtypes = (f"{name} {part.dtype.torch_name}" for name, part in parts.items())
    rest = (f"{name}={_name(value)}" for name, value in vars(record).items() if name not in parts)
    shown = [item for item in (*rest, *dtypes) if not item.startswith(("weight_shape=", "block_type="))]
    return f"{record.kind} {list(record.shape)} ({', '.join(shown)})"


def _name(value: object) -> object:
    return getattr(value, "name", value)


def _unlike(odd: list[int], got: str, usual: str, count: int) -> ShardError:
    return ShardError("weights do not stack", expected=f"{usual} for all {count}", got=f"{got} for {_named(odd)}")


def _named(odd: list[int]) -> str:
    listed = ", ".join(map(str, odd[:NAMED])) + (", ..." if len(odd) > NAMED else "")
    return f"number {listed}" if len(odd) == 1 else f"numbers {listed}"
