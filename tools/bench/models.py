"""Quantising a whole checkpoint to q4k: ``uqff quantize`` against the engine, each as a process with start-up.

With ``--quiet`` no errors are measured, which the engine does not either; the table has our time with them too.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import re
import shutil
import statistics
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.bench.processes import Usage, run
from tools.interop import client_job
from tools.interop.install import install_client
from tools.tiny.models import SPECIAL_TOKENS, Float32, TinyModel

__all__ = ["DIMENSIONS", "ENGINE_VERSION", "LAYERS", "Repeated", "engine_command", "make", "measure", "our_command"]

ENGINE_VERSION = "0.9.5"
LAYERS = {"250 M": 5, "1 B": 20}
ROUNDS = 5
CLIENT = Path(client_job.__file__).resolve()
DIMENSIONS = "hidden size 2048, intermediate size 5632, bfloat16"


def engine_command(client: Path, model: Path, out: Path, kind: str) -> list[str]:
    """The engine as a process that quantises a model to one type, on all cores."""
    which = {"model_id": str(model), "arch": "llama", "dtype": "BF16", "write_uqff": str(out / f"{kind}.uqff")}
    return [str(client), str(CLIENT), json.dumps({"do": "load", "which": which, "isq": kind})]


def our_command(model: Path, out: Path, kind: str, *more: str) -> list[str]:
    """The same with uqff."""
    return [sys.executable, "-m", "uqff", "quantize", str(model), str(out), "--isq", kind, *(more or ("--quiet",))]


class Repeated(TinyModel):
    """A Llama whose layers all have the numbers of the first, so that a large one is made as fast as a small one.

    Its tokens are letters, of which llama.cpp's files have a form, too: it does not answer without. All are whole
    characters, so that each is sent as soon as it is there.
    """

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Float32:
        return _numbers(self, re.sub(r"\.\d+\.", ".0.", name), shape)

    def tokenizer(self) -> dict[str, Any]:
        """A ``tokenizer.json`` of one token for each letter; the rest of the vocabulary only has names."""
        words = [*SPECIAL_TOKENS, *string.ascii_lowercase, "ab"]
        words += [f"<{i}>" for i in range(len(words), self.vocab_size)]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            **super().tokenizer(),
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": ["a b"]},
        }


@functools.cache
def _numbers(model: Repeated, name: str, shape: tuple[int, ...]) -> Float32:
    return TinyModel._tensor(model, name, shape)


def make(model: Path, layers: int) -> int:
    """Write a random llama; gives the weights of its layers. In a process of its own: this one stays small."""
    maker = multiprocessing.get_context("spawn").Process(target=_write, args=(model, layers))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError(f"the model was not made: exit code {maker.exitcode}")
    return sum(
        math.prod(shape) for name, shape in _model(layers).shapes().items() if len(shape) == 2 and "embed" not in name
    )


def _write(model: Path, layers: int) -> None:
    _model(layers).write(model)


def _model(layers: int) -> Repeated:
    return Repeated("llama", 2048, 5632, 16, 16, layers, 512, weight_dtype="BF16")


def measure() -> list[dict[str, object]]:
    """One row a size: median seconds and peak MiB of either."""
    client = install_client(ENGINE_VERSION)
    rows: list[dict[str, object]] = []
    for size, layers in LAYERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            model, ours, theirs = (Path(scratch) / name for name in ("model", "ours", "theirs"))
            make(model, layers)
            commands = {
                "uqff": our_command(model, ours, "q4k"),
                "measured": our_command(model, ours, "q4k", "--json"),
                "engine": engine_command(client, model, theirs, "q4k"),
            }
            found: dict[str, list[Usage]] = {name: [] for name in commands}
            for turn in range(ROUNDS + 1):
                for name, command in commands.items():
                    for out in (ours, theirs):
                        shutil.rmtree(out, ignore_errors=True)
                    theirs.mkdir()
                    usage = run(command)
                    if not any((theirs if name == "engine" else ours).iterdir()):
                        raise RuntimeError(f"{name} wrote nothing: {usage.output}")
                    if turn:
                        found[name].append(usage)
            seconds = {name: statistics.median(each.seconds for each in usages) for name, usages in found.items()}
            peaks = {name: max(each.peak_mib for each in usages) for name, usages in found.items()}
            rows.append(
                {
                    "weights": size,
                    "uqff s": round(seconds["uqff"], 2),
                    "with errors s": round(seconds["measured"], 2),
                    "engine s": round(seconds["engine"], 2),
                    "uqff / engine": round(seconds["uqff"] / seconds["engine"], 3),
                    "uqff peak MiB": round(peaks["uqff"]),
                    "engine peak MiB": round(peaks["engine"]),
                }
            )
    return rows
