"""A mix as a whole: the smallest whose measured divergence is within what is asked for, and what makes it doubtful."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from uqff.errors import UnsupportedError
from uqff.evaluation.measures import Estimate
from uqff.planning.assign import Assignment
from uqff.planning.candidates import Candidate, Unit
from uqff.planning.whole import TRIES, doubts, within_divergence

BITS = (2, 3, 4, 5, 6, 8)


def units() -> list[Unit]:
    """Eight layers, of which a bit more quarters the cost."""
    return [
        Unit(str(at), [], {str(bits): Candidate(str(bits), bits * 100, 0.0, (1 + at) * 4.0**-bits) for bits in BITS})
        for at in range(8)
    ]


def times(factor: float, asked: list[Assignment]) -> Callable[[Assignment], Estimate]:
    """A whole that diverges by so many times what its layers add up to."""

    def measure(mix: Assignment) -> Estimate:
        asked.append(mix)
        return Estimate(factor * mix.cost, 0.0)

    return measure


@pytest.mark.parametrize("factor", [0.05, 0.3, 1.0, 1.7, 20.0])
def test_what_is_measured_is_within_what_is_asked_for(factor: float) -> None:
    """Whether layers add up to more or to less; and it is not much smaller, after a few measurements."""
    asked: list[Assignment] = []
    for kld in (0.2, 0.05, 0.02):
        asked.clear()
        mix, found = within_divergence(units(), kld, times(factor, asked))
        assert found.value == factor * mix.cost
        assert found.value <= kld
        assert found.value > 0.6 * kld or {each.kind for each in mix.chosen} == {"2"}
        assert len(asked) <= TRIES


def test_what_no_mix_reaches() -> None:
    """It says how near the best comes; a whole that is better than predicted is found all the same."""
    least = sum((1 + at) * 4.0**-8 for at in range(8))
    with pytest.raises(UnsupportedError, match=f"no mix of types is that good: expected {5 * least:.3g} or more"):
        within_divergence(units(), least, times(5.0, []))
    mix, _ = within_divergence(units(), 0.7 * least, times(0.5, []))
    assert mix.cost <= 1.4 * least


def test_a_jump_is_not_stepped_on() -> None:
    """Where a type is no small error but another answer, mixes with it are left, whatever is predicted of them."""

    def measure(mix: Assignment) -> Estimate:
        return Estimate(mix.cost + 0.5 * any(each.kind in "23" for each in mix.chosen), 0.1)

    mix, found = within_divergence(units(), 0.1, measure)
    assert found.value <= 0.1
    assert not {"2", "3"} & {each.kind for each in mix.chosen}


def test_doubts() -> None:
    """Nothing is said of what agrees; a factor of two, a wide error and another text each have a sentence."""
    sure = Estimate(1e-3, 1e-5)
    assert doubts(1e-3, sure) == []
    assert doubts(1.9e-3, sure, Estimate(1.9e-3, 1e-4)) == []
    (told,) = doubts(2.1e-3, sure)
    assert "add up to 0.0021, all together they make 0.001:" in told
    (told,) = doubts(0.4e-3, sure)
    assert "add up to 0.0004" in told
    (told,) = doubts(1e-3, Estimate(1e-3, 3e-4))
    assert "few predictions of the text that was planned with make most of the divergence, 0.001 ± 0.0003" in told
    few, other = doubts(1e-3, sure, Estimate(5e-2, 4e-2))
    assert "checked with make most of the divergence, 0.05 ± 0.04" in few
    assert "by 0.001 on the text that it was planned with, and by 0.05 on the other" in other
    assert doubts(0.0, Estimate(0.0, 0.0)) == []
