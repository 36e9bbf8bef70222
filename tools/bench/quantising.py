"""Quantising one 4096 × 4096 float32 weight, every type, in turn with the other Python tools that can.

The bound is memcpy of the weight: who quantises reads as much, and writes less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tools.bench.machine import interleaved, memcpy
from tools.bench.peers import quantisers

__all__ = ["measure", "rates"]

SIDE = 4096
SLOW = ("hqq4", "hqq8")


def rates(kinds: tuple[str, ...], *, with_peers: bool) -> dict[str, dict[str, float]]:
    """Millions of weights a second: by type, then by tool (``uqff``, ``memcpy``, peers)."""
    import torch

    import uqff

    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE)
    peers = quantisers(weight) if with_peers else {}
    found = {}
    for kind in kinds:
        ours: Callable[[], object] = partial(uqff.quantize, weight, kind)
        tasks = {"uqff": ours, "memcpy": memcpy(weight), **peers.get(kind, {})}
        taken = interleaved(tasks, 3 if kind in SLOW else 7)
        found[kind] = {name: weight.numel() / seconds / 1e6 for name, seconds in taken.items()}
    return found


def measure() -> list[dict[str, object]]:
    """One row a type: millions of weights a second of uqff and of the peers, and of memcpy."""
    from uqff.quantization.types import KINDS

    rows: list[dict[str, object]] = []
    for kind, found in rates(KINDS, with_peers=True).items():
        row: dict[str, object] = {"type": kind, "uqff Mw/s": round(found["uqff"], 1)}
        for tool in ("gguf-py", "MLX", "hqq", "torch"):
            row[f"{tool} Mw/s"] = round(found[tool], 1) if tool in found else ""
        best = max((rate for tool, rate in found.items() if tool not in ("uqff", "memcpy")), default=None)
        row["× best peer"] = round(found["uqff"] / best, 1) if best else ""
        row["memcpy Mw/s"] = round(found["memcpy"])
        rows.append(row)
    return rows
