"""What of the tables is checked of every change: `make interop-few`, which `.ci/run` calls. `make interop` checks all.

Most tables have a row for each model and type. Few of them: of each model every `turns`-th type, of the next model
those that come one before, so that every model and every type is checked, though not every type of every model. All
rows of a table remain where each is of another kind. Some tables are left out as a whole (`NIGHTLY` of the command),
and of runs, three types. `tests/interop/test_few.py` says what must be among the few.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

__all__ = ["few_of_each"]

T = TypeVar("T")


def few_of_each(rows: Iterable[T], model: Callable[[T], Hashable], turns: int) -> list[T]:
    """Some rows of each model, in their order; all of a model that has fewer than `turns`."""
    models: dict[Hashable, list[T]] = {}
    places: list[tuple[T, Hashable, int]] = []
    for row in rows:
        of = models.setdefault(model(row), [])
        places.append((row, model(row), len(of)))
        of.append(row)
    numbers = {name: number for number, name in enumerate(models)}
    return [row for row, name, place in places if len(models[name]) < turns or (numbers[name] + place) % turns == 0]
