"""Tokens a second of larger random models, one sequence, two threads: ours in both arithmetics, the engine, llama.cpp.

A Llama of 250 million weights and one of a thousand million, made once and kept in the user's cache, some 17 GB.  All
programs have a model loaded at the same time, each in a process of its own, and answer in turn, a few tokens each, for
some rounds: what else happens on the machine happens to all.  llama.cpp runs the GGUF file that ``uqff convert`` makes
of ours, the engine ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.bench import token_times
from tools.bench.models import ENGINE_VERSION, LAYERS, make
from tools.interop.install import install_client, install_llamacpp
from uqff.conversion import gguf_of_uqff
from uqff.quantization.run import quantize_model

__all__ = ["measure"]

KINDS = ("q4_0", "q4k", "q8_0", "q2k", "q3k", "q5k", "q6k", "afq4", "mxfp4", "hqq4", "fp8")
IN_GGUF = ("q4_0", "q4k", "q8_0", "q2k", "q3k", "q5k", "q6k")
THREADS = 2
TOKENS = 8
ROUNDS = 5
SECONDS = 12
"""After which no further round of a model begins."""
SLOW = 0.5
"""Seconds a token from which on a program answers once, with :data:`FEW`."""
FEW = 3


def cache() -> Path:
    """Where models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uqff" / "bench"


def model_of(size: str, kind: str) -> tuple[Path, Path | None]:
    """The directory of a model, and its GGUF file if the type has one; made if they are not there."""
    folder = cache() / size.replace(" ", "-")
    checkpoint, directory, file = folder / "model", folder / kind, folder / f"{kind}.gguf"
    if not checkpoint.exists():
        part = folder / "part"
        shutil.rmtree(part, ignore_errors=True)
        make(part, LAYERS[size])
        part.rename(checkpoint)
    if not directory.exists():
        quantize_model(checkpoint, directory, [kind], measure=False)
    if kind not in IN_GGUF:
        return directory, None
    if not file.exists():
        gguf_of_uqff(directory, file)
    return directory, file


class Program:
    """One program that has a model loaded."""

    def __init__(self, python: Path, name: str, model: Path) -> None:
        command = [str(python), str(Path(token_times.__file__).resolve()), name, str(model), str(THREADS)]
        root = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])} if name == "uqff" else {}
        environment = {**os.environ, **root, "UQFF_NUM_THREADS": str(THREADS), "RAYON_NUM_THREADS": str(THREADS)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._name = name
        self._process: subprocess.Popen[str] = subprocess.Popen(command, **pipes, text=True, env=environment)

    def said(self) -> str:
        """What it says next, but for its log.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdout is not None
        log: deque[str] = deque(maxlen=20)
        for line in self._process.stdout:
            _, found, answer = line.partition(token_times.RESULT)
            if found:
                return answer.strip()
            log.append(line)
        raise RuntimeError(f"{self._name} ended with {self._process.wait()}:\n{''.join(log)}")

    def times(self, how: str, tokens: int) -> list[float]:
        """Seconds from each token to the next."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{how} {tokens}\n")
        self._process.stdin.flush()
        found: list[float] = json.JSONDecoder().raw_decode(self.said())[0]  # a log may go on in the same line
        return found

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def programs(commands: dict[str, tuple[Path, Path]]) -> Iterator[dict[str, Program]]:
    """Of each name, its interpreter and model: all of them, loaded."""
    running: dict[str, Program] = {}
    try:
        for name, (python, model) in commands.items():
            running[name] = Program(python, name, model)
        for each in running.values():
            each.said()
        yield running
    finally:
        for each in running.values():
            each.close()


def times_of(running: dict[str, Program]) -> dict[str, list[float]]:
    """Seconds of tokens of each program and way, in turn; a first answer of each counts only if the program is slow."""
    asked = [(program, how) for program in running for how in (("exact", "engine") if program == "uqff" else ("",))]
    found: dict[str, list[float]] = {}
    begun = time.perf_counter()
    for turn in range(1 + ROUNDS):
        if turn > 1 and time.perf_counter() - begun > SECONDS:
            break
        for program, how in asked:
            name = f"{program} {how}".strip()
            if turn and min(found[name]) > SLOW:  # the first tokens of the first answer may wait for a compiler
                continue
            made = running[program].times(how, TOKENS if turn else FEW)
            found[name] = [*found[name], *made] if turn > 1 else made
    return found


def measure() -> list[dict[str, object]]:
    """One row a size and type."""
    engine = install_client(ENGINE_VERSION)
    llama = install_llamacpp()
    rows: list[dict[str, object]] = []
    for size in LAYERS:
        for kind in KINDS:
            directory, file = model_of(size, kind)
            commands = {"uqff": (Path(sys.executable), directory), "mistralrs": (engine, directory)}
            if file is not None:
                commands["xllamacpp"] = llama, file
            with programs(commands) as running:
                rows.append(row(size, kind, times_of(running)))
    return rows


def row(size: str, kind: str, found: dict[str, list[float]]) -> dict[str, object]:
    """Rates by the median and, in brackets, by the least time of a token; beside the engine, that of the faster way."""
    medians, least = ({name: take(each) for name, each in found.items()} for take in (statistics.median, min))
    names = {"uqff exact": "exact", "uqff engine": "engine's", "mistralrs": "mistral.rs", "xllamacpp": "llama.cpp"}
    shown: dict[str, object] = {"weights": size, "type": kind}
    for name, title in names.items():
        shown[title] = f"{1 / medians[name]:.1f} ({1 / least[name]:.1f})" if name in found else ""
    beside = [each["mistralrs"] / min(each["uqff exact"], each["uqff engine"]) for each in (medians, least)]
    shown["× mistral.rs"] = f"{beside[0]:.2f} ({beside[1]:.2f})"
    return shown
