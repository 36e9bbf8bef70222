"""The assignment of types to units: least cost for a size, by Lagrange multipliers.

For a multiplier λ each unit by itself takes the candidate of least ``cost + λ · size``: a corner of the lower convex
hull of its candidates.  From λ = ∞ (all smallest) downwards, units move to their next corners in the order of what a
byte buys, and every assignment on that way is one of least cost for its size.  Where the next move no longer fits a
budget, later ones that do are taken, so that at most a little of it is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from uqff.errors import UnsupportedError
from uqff.planning.candidates import Candidate, Unit

__all__ = ["Assignment", "corners", "frontier", "within_cost", "within_size"]


@dataclass(frozen=True)
class Assignment:
    """A candidate for each unit.

    Attributes:
        chosen: in the order of the units.
    """

    chosen: tuple[Candidate, ...]

    @property
    def nbytes(self) -> int:
        """Of all layers' payloads."""
        return sum(each.nbytes for each in self.chosen)

    @property
    def cost(self) -> float:
        """What all are taken to cost together."""
        return sum(each.cost for each in self.chosen)


def corners(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The lower convex hull of size and cost, from the smallest candidate on; costs fall along it."""
    hull: list[Candidate] = []
    for each in sorted(candidates, key=lambda c: (c.nbytes, c.cost, c.kind)):
        if hull and each.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], each):
            hull.pop()
        hull.append(each)
    return hull


def _slope(a: Candidate, b: Candidate) -> float:
    """What a byte saves on the way from one to the other."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def _moves(hulls: Sequence[list[Candidate]], room: float) -> list[Assignment]:
    """All assignments on the way from the smallest on, as far as there is room."""
    at = [0] * len(hulls)
    chosen = [hull[0] for hull in hulls]
    size = sum(each.nbytes for each in chosen)
    queue = [(-_slope(hull[0], hull[1]), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    made = [Assignment(tuple(chosen))]
    while queue:
        _, index = heapq.heappop(queue)
        hull = hulls[index]
        larger = hull[at[index] + 1]
        if size + larger.nbytes - chosen[index].nbytes > room:
            continue  # nor do its further corners fit
        size += larger.nbytes - chosen[index].nbytes
        at[index] += 1
        chosen[index] = larger
        made.append(Assignment(tuple(chosen)))
        if at[index] + 1 < len(hull):
            heapq.heappush(queue, (-_slope(larger, hull[at[index] + 1]), index))
    return made


def frontier(units: Sequence[Unit]) -> list[Assignment]:
    """The assignments of least cost for their sizes, from the smallest to the one of least cost."""
    return _moves([corners(list(unit.candidates.values())) for unit in units], float("inf"))


def within_size(units: Sequence[Unit], nbytes: int) -> Assignment:
    """The assignment of least cost that is no larger than so many bytes.

    Raises:
        UnsupportedError: none is that small.
    """
    hulls = [corners(list(unit.candidates.values())) for unit in units]
    smallest = sum(min(each.nbytes for each in unit.candidates.values()) for unit in units)
    if smallest > nbytes:
        raise UnsupportedError("no mix of types is that small", expected=f"{smallest} bytes or more", got=nbytes)
    return _moves(hulls, nbytes)[-1]


def within_cost(units: Sequence[Unit], cost: float) -> Assignment:
    """The smallest assignment on the frontier that costs no more, and what then may still be smaller.

    Raises:
        UnsupportedError: none costs so little.
    """
    found = frontier(units)
    for each in found:
        if each.cost <= cost:
            return _shrunk(units, each, cost)
    raise UnsupportedError("no mix of types is that good", expected=f"{found[-1].cost:.3g} or more", got=cost)


def _shrunk(units: Sequence[Unit], made: Assignment, most: float) -> Assignment:
    """With smaller candidates while the cost allows it, those first that save most; the frontier leaves gaps, which are
    wide where units are few.
    """
    while True:
        room, chosen = most - made.cost, made.chosen
        moves = [
            (candidate.nbytes - chosen[at].nbytes, candidate.cost, at, candidate)
            for at, unit in enumerate(units)
            for candidate in unit.candidates.values()
            if candidate.nbytes < chosen[at].nbytes and candidate.cost - chosen[at].cost <= room
        ]
        if not moves:
            return made
        _, _, at, candidate = min(moves, key=lambda move: move[:3])
        smaller = Assignment((*chosen[:at], candidate, *chosen[at + 1 :]))
        if smaller.cost > most:  # by rounding
            return made
        made = smaller
