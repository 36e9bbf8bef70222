"""Quantising one 4096 × 4096 float32 weight, every type, beside the other Python tools that can."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from machine import interleaved

__all__ = ["measure"]

SIDE = 4096
SLOW = ("hqq4", "hqq8")
ENGINE = {
    "q4_0": 422.0,
    "q8_0": 263.0,
    "q2k": 42.0,
    "q3k": 53.0,
    "q4k": 56.0,
    "q6k": 64.0,
    "afq4": 88.0,
    "f8q8": 110.0,
    "mxfp4": 72.0,
    "fp8": 41.0,
    "hqq4": 2.45,
}
"""Mw/s of mistral.rs 0.9.5 on two cores, measured elsewhere; `make bench` measures it as a whole process too."""


def _peers(weight: Any) -> dict[str, dict[str, Callable[[], object]]]:
    """What other tools offer, by type."""
    import gguf
    import mlx.core as mx

    array = weight.numpy()
    wide = mx.array(array)
    peers: dict[str, dict[str, Callable[[], object]]] = {}
    for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        peers[kind] = {"gguf-py": partial(gguf.quantize, array, gguf.GGMLQuantizationType[kind.upper()])}
    for bits in (2, 3, 4, 6, 8):

        def affine(bits: int = bits) -> None:
            mx.eval(*mx.quantize(wide, 64, bits))

        peers[f"afq{bits}"] = {"mlx": affine}
    return peers


def measure() -> list[dict[str, object]]:
    """One row a type: millions of weights a second of uqff and of the fastest peer, and the engine's known rate."""
    import torch

    import uqff
    from uqff.isq import KINDS

    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE)
    peers = _peers(weight)
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        ours: Callable[[], object] = partial(uqff.quantize, weight, kind)
        taken = interleaved({"uqff": ours, **peers.get(kind, {})}, 3 if kind in SLOW else 7)
        rates = {name: weight.numel() / seconds / 1e6 for name, seconds in taken.items()}
        best = max((name for name in rates if name != "uqff"), key=lambda name: rates[name], default="")
        rows.append(
            {
                "type": kind,
                "uqff Mw/s": round(rates["uqff"], 1),
                "peer": best,
                "peer Mw/s": round(rates[best], 1) if best else "",
                "engine Mw/s (published)": ENGINE.get(kind, ""),
                "× engine": round(rates["uqff"] / ENGINE[kind], 2) if kind in ENGINE else "",
            }
        )
    return rows
