"""The other engine: ``atheris``, which sees what code an input reaches and goes on from those that reach new code.

One process for each target, begun by ``python -m tools.fuzz --engine atheris``: the library reads the package's code
while it is imported, and ends the process when the time is over.  What an input may do is the same as in the other
engine, and is counted by the same :class:`~tools.fuzz.campaign.Campaign`; half of the changes are ours, which know of
headers and documents.  Inputs that came after the last count, fewer than 256, are not counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["available", "run"]

COUNTED = 256
"""Inputs after which memory is looked at, and the count written."""


def available() -> bool:
    """Whether the library is installed."""
    return find_spec("atheris") is not None


def run(name: str, home: Path, seconds: int, seed: int, counts: Path) -> None:
    """The inputs of one target, in a process of its own, which writes what it counted into a file."""
    arguments = [name, str(home), str(seconds), str(seed), str(counts)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tools.fuzz.coverage", *arguments], check=False)


def main(name: str, home: Path, seconds: int, seed: int, counts: Path) -> None:
    """Let the library choose inputs until the time is over; does not return."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["uqff"]):
        from tools.fuzz.campaign import Campaign, write_tallies
        from tools.fuzz.mutators import mutated
        from tools.fuzz.targets import targets

    folder = Path(tempfile.mkdtemp(prefix="uqff-fuzz-", dir=counts.parent))
    (target,) = (each for each in targets(folder) if each.name == name)
    campaign, ran = Campaign(target, home, Random(seed)), [b""][:0]
    reached = home / "reached" / campaign.kept.name
    reached.mkdir(parents=True, exist_ok=True)
    campaign.memory.begin()

    def one(data: bytes) -> None:
        ran.append(bytes(data))
        campaign.take(ran[-1])
        if len(ran) == COUNTED:
            campaign.weigh(ran)
            ran.clear()
            write_tallies(counts, {name: campaign.tally})
            campaign.memory.begin()

    def change(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            return mutated(bytes(data), target.kind, random, campaign.corpus)[:most]
        return bytes(atheris.Mutate(data, most))

    own = [f"-max_total_time={seconds}", f"-seed={seed % 2**31 or 1}", "-verbosity=0", "-print_final_stats=0"]
    own += ["-timeout=0", "-handle_alrm=0", "-rss_limit_mb=0", "-max_len=40000"]  # our own bounds
    atheris.Setup([sys.argv[0], *own, str(reached), str(campaign.kept)], one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
