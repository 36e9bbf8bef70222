"""The engine, type by type: mistral.rs quantising the model of 250 million weights, in turn with ``uqff quantize``.

The engine's rate is taken from its log: from "Serializing ... layers", when the checkpoint is loaded, to "Writing shard
0", when all layers are quantised in memory; the whole process is measured beside it.  Our rate is that of
``uqff.quantize`` on a 4096 × 4096 float32 weight, measured just before.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

from tools.bench.models import DIMENSIONS, ENGINE_VERSION, engine_command, make, our_command
from tools.bench.processes import Usage, run
from tools.bench.quantising import rates

__all__ = ["measure"]

TARGETS = {
    "q4_0": 2,
    "q8_0": 2,
    "q2k": 6,
    "q3k": 6,
    "q4k": 6,
    "q6k": 6,
    "afq4": 10,
    "f8q8": 10,
    "mxfp4": 10,
    "fp8": 10,
    "hqq4": 10,
}
"""Types, and how many times the engine's rate is wanted."""

ROUNDS = 2
SLOW = ("hqq4",)
LAYERS = 5

_BEGIN = re.compile(r"(\S+Z)\s+INFO\b.*Serializing 1/1: \d+ \S+ UQFF layers")
_END = re.compile(r"(\S+Z)\s+INFO\b.*Writing shard 0")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def quantising_seconds(log: str) -> float:
    """How long the engine quantised, by its log.

    Raises:
        ValueError: the log has not the two lines.
    """
    text = _ANSI.sub("", log)
    begin, end = _BEGIN.search(text), _END.search(text)
    if begin is None or end is None:
        raise ValueError(f"no times in the engine's log:\n{log}")
    first, last = (datetime.fromisoformat(match[1].replace("Z", "+00:00")) for match in (begin, end))
    return (last - first).total_seconds()


def measure() -> list[dict[str, object]]:
    """One row a type: rates, whole processes, peaks of either."""
    from tools.interop.install import install_client

    client = install_client(ENGINE_VERSION)
    own = rates(tuple(TARGETS), with_peers=False)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, ours, theirs = (Path(scratch) / name for name in ("model", "ours", "theirs"))
        weights = make(model, LAYERS)
        for kind, target in TARGETS.items():
            found: dict[str, list[Usage]] = {"uqff": [], "engine": []}
            for _ in range(1 if kind in SLOW else ROUNDS):
                for name, out in (("uqff", ours), ("engine", theirs)):
                    shutil.rmtree(out, ignore_errors=True)
                    if name == "engine":
                        out.mkdir()
                    command = (
                        our_command(model, out, kind) if name == "uqff" else engine_command(client, model, out, kind)
                    )
                    found[name].append(run(command))
            seconds = min(quantising_seconds(usage.output) for usage in found["engine"])
            best = {name: min(usage.seconds for usage in usages) for name, usages in found.items()}
            rate = weights / seconds / 1e6
            rows.append(
                {
                    "type": kind,
                    "uqff Mw/s": round(own[kind]["uqff"], 1),
                    "engine Mw/s": round(rate, 2),
                    "× engine": round(own[kind]["uqff"] / rate, 1),
                    "wanted": target,
                    "uqff quantize s": round(best["uqff"], 2),
                    "engine s": round(best["engine"], 2),
                    "uqff peak MiB": round(max(usage.peak_mib for usage in found["uqff"])),
                    "engine peak MiB": round(max(usage.peak_mib for usage in found["engine"])),
                }
            )
    print(f"({weights / 1e6:.0f} million weights, llama of {DIMENSIONS})")
    return rows
