"""``make fuzz TIME=SECONDS``: only a UqffError comes out of a hostile input, within bounded time and memory.

An input is a changed one of the corpus: the seeds, and each input that gave an outcome (kind of error, problem, field)
which none before had given; these are kept, beyond the run, in ``~/.cache/uqff-fuzz`` or where ``UQFF_FUZZ`` says.
What breaks a promise is kept there too, under ``found``, and what all runs have counted, in ``summary.json``.

Each target has the same time of the processor.  A run that is interrupted says what it has done, as one that ends.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tools.fuzz import coverage
from tools.fuzz.campaign import Campaign, Tally, read_tallies, write_tallies
from tools.fuzz.targets import targets

TURN = 0.5
"""Seconds of the processor that a target has before the next one has its turn."""

MOST_TOGETHER = 4096
"""Inputs of a turn."""

SAVED = 30.0
"""Seconds after which the summary is written again."""


def main() -> None:
    """Take turns among the targets until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--time", type=float, default=60, metavar="SECONDS", help="for all targets together")
    parser.add_argument("--inputs", type=int, metavar="N", help="of each target, in place of a time")
    parser.add_argument("--seed", type=int, default=None, help="of the changes; another one each time without")
    parser.add_argument("--only", default="", metavar="NAME", help="only targets whose name begins so")
    parser.add_argument(
        "--engine", choices=("own", "atheris"), default="own", help="what chooses inputs; atheris if it is installed"
    )
    parser.add_argument("--light", action="store_true", help="without targets that need transformers")
    arguments = parser.parse_args()
    if arguments.engine == "atheris" and not coverage.available():
        parser.error("atheris is not installed here: pip install atheris, for Linux and some versions of Python")
    warnings.simplefilter("ignore")
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    home = Path(os.environ.get("UQFF_FUZZ") or Path.home() / ".cache" / "uqff-fuzz")
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    campaigns: list[Campaign] = []
    saved = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="uqff-fuzz-", dir=room) as folder:
        chosen = targets(Path(folder), arguments.only, light=arguments.light)
        home.mkdir(parents=True, exist_ok=True)
        summary, before = home / "summary.json", read_tallies(home / "summary.json")
        if arguments.engine == "atheris":
            if not coverage.available():
                parser.error(
                    "atheris is not installed here: pip install atheris, for Linux and some versions of Python"
                )
            counts = Path(folder, "counts.json")
            for target in chosen:
                coverage.run(target.name, home, math.ceil(arguments.time / len(chosen)), seed, counts)
                before = _added(before, read_tallies(counts))
                counts.unlink(missing_ok=True)
                write_tallies(summary, before)
            _print(before)
            sys.exit(any(tally.problems for tally in before.values()))
        asked: list[int] = []  # to end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: asked.append(number))
        campaigns += [Campaign(each, home, Random(f"{seed} {each.name}")) for each in chosen if not asked]
        gc.freeze()
        for campaign, inputs, seconds in _turns(campaigns, arguments.inputs, arguments.time):
            if asked:
                print("interrupted")
                break
            campaign.batch(inputs, seconds)
            if time.monotonic() > saved + SAVED:
                write_tallies(summary, _sum(before, campaigns))
                saved = time.monotonic()
        write_tallies(summary, _sum(before, campaigns))
    print(f"seed {seed}")
    _print({each.target.name: each.tally for each in campaigns})
    problems = list(dict.fromkeys(problem for each in campaigns for problem in each.problems))
    print(*problems[:40], sep="\n", end="\n" if problems else "")
    print(f"{sum(each.tally.inputs for each in campaigns)} inputs, {sum(c.tally.problems for c in campaigns)} problems")
    if before:
        print("with earlier runs:")
        _print(_sum(before, campaigns))
    sys.exit(bool(problems))


def _turns(campaigns: list[Campaign], inputs: int | None, seconds: float) -> Iterator[tuple[Campaign, int, float]]:
    """Whose turn it is, for how many inputs and how long."""
    end, left = time.monotonic() + seconds, inputs
    while left if left is not None else time.monotonic() < end:
        turn = min(left or MOST_TOGETHER, MOST_TOGETHER)
        for campaign in campaigns:
            yield campaign, turn, TURN if left is None else float("inf")
        left = None if left is None else left - turn


def _sum(before: dict[str, Tally], campaigns: list[Campaign]) -> dict[str, Tally]:
    return _added(before, {each.target.name: each.tally for each in campaigns})


def _added(before: dict[str, Tally], now: dict[str, Tally]) -> dict[str, Tally]:
    return {name: before.get(name, Tally()) + now.get(name, Tally()) for name in {**before, **now}}


def _print(tallies: dict[str, Tally]) -> None:
    width = max(map(len, tallies), default=0)
    print(f"{'target':{width}} {'inputs':>9} {'refused':>9} outcomes slowest s       MB problems")
    whole = Tally()
    for name, tally in {**tallies, "all": None}.items():
        whole += tally or Tally()
        shown = tally or whole
        print(
            f"{name:{width}} {shown.inputs:9} {shown.refused:9} {shown.outcomes:8} {shown.slowest:9.2f} "
            f"{shown.largest / 1e6:8.1f} {shown.problems:8}"
        )


if __name__ == "__main__":
    main()
