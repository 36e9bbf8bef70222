"""Tokens a second of a small Llama, one sequence, one thread each: ``uqff.parallel`` and the engine on one file.

The engine's start-up and prompt are taken out: two runs of different length, and the difference of both.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tools.interop.client import ENVIRONMENT, Client
from tools.interop.client_job import PROMPT
from tools.interop.install import install_client
from tools.tiny.models import TinyModel
from uqff.parallel import load_model
from uqff.parallel.generate import generate
from uqff.parallel.text import Text

__all__ = ["measure"]

ENGINE_VERSION = "0.9.5"
MODEL = TinyModel("llama", 1024, 2816, 16, 4, 8, 512, std=0.05, seed=61)
KINDS = ("q4_0", "q8_0", "q4k", "afq4", "hqq4", "fp8")
SHORT, LONG = 8, 72
ROUNDS = 3


def _engine(client: Client, directory: Path, kind: str) -> float:
    """Tokens a second."""
    rates = []
    for _ in range(ROUNDS):
        runs = []
        for tokens in (SHORT, LONG):
            start = time.perf_counter()
            made = client.generate(directory, [f"{kind}-0.uqff"], architecture="llama", dtype="F32", tokens=tokens)
            runs.append((time.perf_counter() - start, len(made.tokens)))
        rates.append((runs[1][1] - runs[0][1]) / (runs[1][0] - runs[0][0]))
    return statistics.median(rates)


def _ours(directory: Path) -> tuple[float, float]:
    """Tokens a second, and seconds until the model is there."""
    start = time.perf_counter()
    model = load_model(directory)
    loaded = time.perf_counter() - start
    prompt = Text(directory).encode(PROMPT)
    generate(model, prompt, SHORT)
    rates = []
    for _ in range(ROUNDS):
        seconds = []
        for tokens in (SHORT, LONG):
            start = time.perf_counter()
            generate(model, prompt, tokens)
            seconds.append(time.perf_counter() - start)
        rates.append((LONG - SHORT) / (seconds[1] - seconds[0]))
    return statistics.median(rates), loaded


def measure() -> list[dict[str, object]]:
    """One row a type."""
    client = Client(install_client(ENGINE_VERSION), environment=dict(ENVIRONMENT))
    rows: list[dict[str, object]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch, "model")
        MODEL.write(checkpoint)
        for kind in KINDS:
            directory = Path(scratch, kind)
            directory.mkdir()
            client.write(checkpoint, directory / f"{kind}.uqff", architecture="llama", dtype="F32", isq=kind)
            (ours, loaded), theirs = _ours(directory), _engine(client, directory, kind)
            rows.append(
                {
                    "type": kind,
                    "weights": f"{sum(math.prod(shape) for shape in MODEL.shapes().values()) / 1e6:.0f} M",
                    "uqff tokens/s": round(ours, 1),
                    "engine tokens/s": round(theirs, 1),
                    "uqff / engine": round(ours / theirs, 2),
                    "uqff load s": round(loaded, 2),
                }
            )
    torch.set_num_threads(threads)
    return rows
