"""Tokens a second of larger random models, one sequence, two threads: ours in both arithmetics, the engine, llama.cpp.

A Llama of 250 million weights and one of a thousand million.  Of every program two runs of different length, in turn,
the model loaded; what a token takes is the difference of both, least of all rounds.  The engine keeps keys and values
in float16, as it does by itself; llama.cpp runs the GGUF file that ``uqff convert`` makes of ours.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tools.bench.models import ENGINE_VERSION, LAYERS, make
from tools.interop.client import Client
from tools.interop.install import install_client
from tools.interop.llamacpp import PACKAGES, run_llamacpp
from uqff.conversion import gguf_of_uqff
from uqff.parallel import load_model, set_arithmetic
from uqff.parallel.generate import generate
from uqff.quantization.run import quantize_model

__all__ = ["measure"]

KINDS = ("q4_0", "q8_0", "q4k", "afq4", "mxfp4")
IN_GGUF = ("q4_0", "q8_0", "q4k")
THREADS = 2
SHORT, LONG = 8, 40
ROUNDS = 3
PROMPT = [5, 9, 17, 30]


def _rate(seconds: Callable[[int], float]) -> float:
    """Tokens a second, by two lengths, least of each."""
    taken = {tokens: min(seconds(tokens) for _ in range(ROUNDS)) for tokens in (SHORT, LONG)}
    return (LONG - SHORT) / (taken[LONG] - taken[SHORT])


def _ours(model: torch.nn.Module, arithmetic: str) -> float:
    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        generate(model, PROMPT, tokens)
        return time.perf_counter() - start

    set_arithmetic(model, "engine" if arithmetic == "engine" else "exact")
    generate(model, PROMPT, 2)
    return _rate(seconds)


def _engine(client: Client, directory: Path) -> float:
    """The loading of the model is in both runs alike."""
    names = [file.name for file in sorted(directory.glob("*.uqff"))]

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        client.generate(directory, names, architecture="llama", dtype="F32", tokens=tokens)
        return time.perf_counter() - start

    return _rate(seconds)


def _llamacpp(python: Path, directory: Path) -> float:
    file = directory / "model.gguf"
    gguf_of_uqff(directory, file)
    made = run_llamacpp(python, file, PROMPT, lengths=[SHORT, LONG] * ROUNDS)
    taken = {tokens: min(made["seconds"][i::2]) for i, tokens in enumerate((SHORT, LONG))}
    return (LONG - SHORT) / (taken[LONG] - taken[SHORT])


def measure() -> list[dict[str, object]]:
    """One row a size and type."""
    environment = {"RAYON_NUM_THREADS": str(THREADS), "MISTRALRS_CPU_KV_F32": "0"}
    client = Client(install_client(ENGINE_VERSION), timeout=600, environment=environment)
    package, _, version = PACKAGES[0].partition("==")
    python = install_client(version, package, *PACKAGES[1:])
    rows: list[dict[str, object]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    for size, layers in LAYERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch, "model")
            make(checkpoint, layers)
            for kind in KINDS:
                directory = Path(scratch, kind)
                quantize_model(checkpoint, directory, [kind], measure=False)
                model = load_model(directory, dtype=torch.float32)
                rates = {f"uqff {name}": _ours(model, name) for name in ("exact", "engine")}
                del model
                engine = _engine(client, directory)
                row: dict[str, object] = {"weights": size, "type": kind}
                row |= {f"{name}, tokens/s": round(rate, 2) for name, rate in rates.items()}
                row["mistral.rs"] = round(engine, 2)
                row["llama.cpp"] = round(_llamacpp(python, directory), 2) if kind in IN_GGUF else ""
                row["best / mistral.rs"] = round(max(rates.values()) / engine, 2)
                rows.append(row)
                shutil.rmtree(directory)
    torch.set_num_threads(before)
    return rows
