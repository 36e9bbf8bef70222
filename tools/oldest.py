"""Print the oldest version of every dependency that `pyproject.toml` allows, as constraints for pip.

    python -m tools.oldest > oldest.txt                    # make test-oldest
    python -m tools.oldest torch=2.13.0 > oldest.txt       # but for torch

Extras count too: of several bounds of a dependency, the highest. Nothing but Python is needed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
BOUND = re.compile(r'"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?>=([0-9.]+)(?:,[^";]*)?(?: *;([^"]*))?"')


def oldest(pyproject: str, others: dict[str, str] | None = None) -> list[str]:
    """The lines, one for each dependency and marker, sorted; `others` are versions to take instead.

    Raises ValueError for a dependency without a lower bound.
    """
    versions: dict[tuple[str, str], str] = {}
    for group in re.findall(r"^(?:[a-z]+ = |dependencies = )\[(.*?)\]$", dependencies(pyproject), re.M | re.S):
        for requirement in re.findall(r'"[^"]*"', group):
            match = BOUND.fullmatch(requirement)
            if match is None:
                raise ValueError(f"{requirement} has no lower bound")
            name, version, marker = match.groups()
            place = name, f" ;{marker}" if marker else ""
            versions[place] = max(versions.get(place, "0"), version, key=numbers)
    return sorted(
        f"{name}=={(others or {}).get(name, version)}{marker}" for (name, marker), version in versions.items()
    )


def numbers(version: str) -> list[int]:
    """A version as numbers, for comparing."""
    return [int(part) for part in version.split(".")]


def dependencies(pyproject: str) -> str:
    """The lists of dependencies, and nothing else."""
    start, extras = pyproject.index("\ndependencies = ["), pyproject.index("\n[project.optional-dependencies]")
    return pyproject[start : pyproject.index("\n\n", start)] + pyproject[extras : pyproject.index("\n\n", extras)]


if __name__ == "__main__":
    given = dict(each.split("=", 1) for each in sys.argv[1:])
    sys.stdout.write("\n".join(oldest(PYPROJECT.read_text(), given)) + "\n")
