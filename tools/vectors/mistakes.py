"""Mistakes that a quantiser can have, from ``mistakes.yml``; see :mod:`tools.vectors.mutants`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import yaml


class Mistake(NamedTuple):
    """A mistake: a passage of a module's source, what stands there instead, and whose bytes it may change."""

    text: str
    kinds: tuple[str, ...]
    module: str
    old: str
    new: str
    equivalent: str = ""
    """Why no weights show it, if none do."""


def _read(file: Path) -> tuple[Mistake, ...]:
    return tuple(
        Mistake(**{key: value for key, value in each.items() if key != "types"}, kinds=tuple(each["types"]))
        for each in yaml.safe_load(file.read_text("utf-8"))
    )


MISTAKES: Final = _read(Path(__file__).with_suffix(".yml"))
