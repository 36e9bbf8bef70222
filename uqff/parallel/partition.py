"""Which part of the intermediate dimension of experts a rank holds: outputs of gate and up, inputs of down.

All three projections are cut alike, so the part must suit the blocks of each; and every rank must come to the same
conclusion, or some would wait for others that have given up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import torch

from uqff.errors import ShapeError, ShardError, UnsupportedError
from uqff.families import QuantizedTensor
from uqff.parallel.comm import Comm
from uqff.parallel.shard import Shard, listed_world_sizes

__all__ = [
    "PROJECTIONS",
    "Cut",
    "IntermediateRange",
    "OnMisaligned",
    "at",
    "fused_convention",
    "part_of",
    "split_fused",
]

PROJECTIONS: Final = (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
"""Names, and which dimension of one expert's matrix is the intermediate one; of a stack it is the next."""


def at(key: str | None, name: object) -> str | None:
    """The key of a projection of experts."""
    return None if key is None else f"{key}.{name}"


OnMisaligned: TypeAlias = Literal["error", "uneven", "replicate"]
"""What is to happen where blocks do not allow equal parts; see :mod:`uqff.parallel.experts`."""


class Cut(NamedTuple):
    """A weight and its intermediate dimension.

    Attributes:
        weight: of one expert or a stack.
        dim: the dimension that is cut.
    """

    weight: QuantizedTensor | torch.Tensor
    dim: int

    @property
    def size(self) -> int:
        """Of the dimension."""
        size: int = self.weight.shape[self.dim]
        return size

    @property
    def alignment(self) -> int:
        """Multiples at which the dimension can be cut."""
        return self.weight.alignment(self.dim) if isinstance(self.weight, QuantizedTensor) else 1

    def fits(self, start: int, length: int) -> bool:
        """Whether a range can be cut."""
        whole = length == self.size or not isinstance(self.weight, QuantizedTensor)
        return whole or self.weight.can_narrow(self.dim, start, length)  # type: ignore[union-attr]


class IntermediateRange(NamedTuple):
    """A range of the intermediate dimension."""

    start: int
    length: int

    def along(self, dim: int) -> Shard:
        """The slice of a weight whose dimension ``dim`` is the intermediate one."""
        return Shard.offset(dim, *self)


def part_of(
    cuts: Sequence[Cut], comm: Comm, on_misaligned: OnMisaligned, layer: str | None = None
) -> IntermediateRange | None:
    """The rank's part.

    Args:
        cuts: all weights that are cut, or one of each sort.
        comm: rank and world size.
        on_misaligned: what to do if equal parts do not suit every weight.
        layer: key of the experts, for errors.

    Returns:
        The part; None if every rank is to hold everything.

    Raises:
        ShapeError: the dimensions differ.
        ShardError: there is no part for every rank.
        UnsupportedError: no such ``on_misaligned``.
    """
    if on_misaligned not in get_args(OnMisaligned):
        raise UnsupportedError(
            "no such way with blocks that do not allow equal parts",
            layer=layer,
            field="on_misaligned",
            expected=", ".join(get_args(OnMisaligned)),
            got=on_misaligned,
        )
    size, world_size = cuts[0].size, comm.world_size
    odd = [cut.size for cut in cuts if cut.size != size]
    if odd:
        raise ShapeError("projections do not fit each other", layer=layer, expected=f"{size} between them", got=odd[0])
    if world_size == 1:
        return IntermediateRange(0, size)
    equal = list(_equal(size, world_size))
    if _suit(equal, cuts):
        return equal[comm.rank]
    if on_misaligned == "replicate":
        return None
    unit = math.lcm(*(cut.alignment for cut in cuts))
    uneven = list(_uneven(size, unit, world_size))
    if on_misaligned == "uneven" and _suit(uneven, cuts):
        return uneven[comm.rank]
    parts = "equal parts" if on_misaligned == "error" else "parts"
    works = listed_world_sizes(size, unit) if on_misaligned == "error" else f"world sizes up to {-(-size // unit)} work"
    raise ShardError(
        f"experts cannot be cut in {parts}",
        layer=layer,
        expected=f"{size} intermediate values in multiples of {unit}: {works}",
        got=f"world size {world_size}",
    )


def _equal(size: int, world_size: int) -> Iterator[IntermediateRange]:
    if size % world_size == 0:
        length = size // world_size
        yield from (IntermediateRange(rank * length, length) for rank in range(world_size))


def _uneven(size: int, unit: int, world_size: int) -> Iterator[IntermediateRange]:
    units = -(-size // unit)  # the last may be shorter: a slice can end with the dimension
    edges = [min(rank * units // world_size * unit, size) for rank in range(world_size + 1)]
    if units >= world_size:
        yield from (IntermediateRange(start, end - start) for start, end in pairwise(edges))


def _suit(parts: list[IntermediateRange], cuts: Sequence[Cut]) -> bool:
    return bool(parts) and all(cut.fits(*part) for cut in cuts for part in parts)


def split_fused(
    gate_up: torch.Tensor, down: torch.Tensor, *, layer: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of a checkpoint that keeps gate and up in one tensor; views, nothing is read.

    Args:
        gate_up: the gates, then the ups.
        down: the downs.
        layer: key of the experts, for errors.

    Returns:
        ``[E, inter, hidden]``, ``[E, inter, hidden]`` and ``[E, hidden, inter]``.

    Raises:
        ShapeError: see :func:`fused_convention`.
    """
    turned_gate_up, turned_down = fused_convention(tuple(gate_up.shape), tuple(down.shape), layer=layer)
    fused = gate_up.transpose(1, 2) if turned_gate_up else gate_up
    outputs_first = down.transpose(1, 2) if turned_down else down
    inter = fused.shape[1] // 2
    return fused.narrow(1, 0, inter), fused.narrow(1, inter, inter), outputs_first


def fused_convention(gate_up: Sequence[int], down: Sequence[int], *, layer: str | None = None) -> tuple[bool, bool]:
    """Whether the tensors of all experts are transposed, told by their shapes: gate and up, and down.

    There are two conventions::

        inputs first      gate_up_proj [E, hidden, 2·inter]    down_proj [E, inter, hidden]
        outputs first     gate_up_proj [E, 2·inter, hidden]    down_proj [E, hidden, inter]

    Tensors of different conventions fit too, if they fit in no other way.  (The engine looks at each by itself and
    takes the former if it can: for inter = hidden it turns a ``down_proj`` of the latter.)

    Raises:
        ShapeError: the shapes fit in no way.
    """
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        for turned_gate_up, turned_down in ((True, True), (False, False), (True, False), (False, True)):
            out, inputs = gate_up[:0:-1] if turned_gate_up else gate_up[1:]
            hidden, inter = down[:0:-1] if turned_down else down[1:]
            if (out, inputs) == (2 * inter, hidden):
                return turned_gate_up, turned_down
    raise ShapeError(
        "not a fused gate and up with its down",
        layer=layer,
        expected="[E, hidden, 2·inter] and [E, inter, hidden], or [E, 2·inter, hidden] and [E, hidden, inter]",
        got=f"{list(gate_up)} and {list(down)}",
    )
