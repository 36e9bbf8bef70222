"""A mix measured as a whole: what its layers cost one by one may not add up to it.

It does not where errors of layers go along with each other, and where an error is no small change: a hidden state that
was nearly at home with another expert is sent there, which is rare, and costs much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from uqff.errors import UnsupportedError
from uqff.planning.assign import Assignment, frontier, within_cost
from uqff.planning.candidates import Unit

if TYPE_CHECKING:
    from uqff.evaluation.measures import Estimate

__all__ = ["doubts", "within_divergence"]

Measure = Callable[[Assignment], "Estimate"]

TRIES: Final = 6
"""Mixes that are measured at most for one that diverges no more than asked for."""
NEAR: Final = 0.9
"""Share of the divergence that was asked for at which no larger one is looked for."""
FAR: Final = 2.0
"""Times by which two divergences differ that are not one."""
UNSURE: Final = 0.25
"""Share of a divergence that its standard error is at most where the divergence says something."""


def within_divergence(units: Sequence[Unit], kld: float, measure: Measure) -> tuple[Assignment, Estimate]:
    """The smallest mix found that diverges no more than so much, and how much.

    Args:
        units: with costs.
        kld: mean divergence, at most.
        measure: gives that of a mix as a whole.

    Raises:
        UnsupportedError: none was found.
    """
    found: dict[tuple[str, ...], tuple[Assignment, Estimate]] = {}
    goal = kld
    for _ in range(TRIES):
        made = _within(units, goal)
        kinds = tuple(each.kind for each in made.chosen)
        if kinds in found:
            break
        value = measure(made)
        found[kinds] = made, value
        if NEAR * kld <= value.value <= kld or value.value <= 0:
            break
        goal = NEAR * kld * made.cost / value.value
    good = [each for each in found.values() if each[1].value <= kld]
    if not good:
        least = min(value.value for _, value in found.values())
        raise UnsupportedError("no mix of types is that good", expected=f"{least:.3g} or more", got=kld)
    return min(good, key=lambda each: each[0].nbytes)


def _within(units: Sequence[Unit], cost: float) -> Assignment:
    """The smallest of that cost, or the one of least cost."""
    best = frontier(units)[-1]
    return within_cost(units, cost) if best.cost <= cost else best


def doubts(cost: float, measured: Estimate, check: Estimate | None = None) -> list[str]:
    """What makes a prediction doubtful, in sentences.

    Args:
        cost: what the layers' divergences add up to.
        measured: of the mix as a whole, on the same text.
        check: on another.
    """
    made = []
    if _far(cost, measured.value):
        made.append(
            f"the divergences of single layers add up to {cost:.3g}, all together they make {measured.value:.3g}: "
            "what is predicted of other mixes is as doubtful"
        )
    for what, each in (("planned with", measured), ("checked with", check)):
        if each is not None and each.error is not None and each.error > UNSURE * abs(each.value):
            made.append(
                f"few predictions of the text that was {what} make most of the divergence, {each.value:.3g} ± "
                f"{each.error:.2g}: more windows tell more"
            )
    if check is not None and _far(measured.value, check.value):
        made.append(
            f"the mix diverges by {measured.value:.3g} on the text that it was planned with, and by {check.value:.3g} "
            "on the other"
        )
    return made


def _far(a: float, b: float) -> bool:
    return max(a, b) > FAR * max(min(a, b), 0.0)
