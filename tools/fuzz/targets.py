"""What reads files of strangers, and what it is given to begin with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uqff
from tools.tiny.models import TinyModel
from uqff.container.framing import parse_header
from uqff.conversion.tokenizer import tokenizer_files
from uqff.gguf.reader import open_gguf
from uqff.quantization.recipe import parse_recipe

__all__ = ["Target", "targets"]

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"
MOST_SEED = 20_000
"""Bytes of the longest seed: what is long is slow, and no more hostile."""

RECIPES = (
    b"0-8:\n  isq: q6k\n31:\n  isq: q8_0\n'/\\.down_proj\\.weight$/':\n  isq: q5k\n",
    b"'/(?i)layers\\.(0|1[0-9]*)\\.[a-z_]+(x{2,4}|y?)*$/': {isq: q4k, device: 'cuda[0]'}\n0: {}\n",
)


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: what it is called.
        kind: of its inputs, see :mod:`tools.fuzz.mutators`.
        seeds: inputs to begin with.
        read: reads one, and may say what it found; whatever it raises but a :class:`uqff.UqffError` is an escape.
    """

    name: str
    kind: str
    seeds: list[bytes]
    read: Callable[[bytes], object]


def _blob(data: bytes) -> None:
    weight, _ = uqff.deserialize(data)
    if weight.numel < 1 << 20:
        weight.dequantize()


def _recipe(data: bytes) -> None:
    recipe = parse_recipe(data)
    for rule in recipe.rules:
        if rule.pattern is not None:
            rule.pattern.search("model.layers.10.mlp.down_proj.weight")


class _Directory:
    """A model directory of which one file is hostile."""

    def __init__(self, source: Path | None, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="uqff-fuzz-")
        self.home, self.name = Path(self._folder.name), name
        for path in () if source is None else source.iterdir():
            (self.home / path.name).write_bytes(path.read_bytes())

    def read(self, data: bytes) -> None:
        (self.home / self.name).write_bytes(data)
        with uqff.open(self.home) as file:
            for key in file:
                weight, _ = file[key]
                if weight.numel < 1 << 20:
                    weight.dequantize()
            for name in file.residual:
                _ = file.residual[name]

    def verify(self, data: bytes) -> str:
        (self.home / self.name).write_bytes(data)
        found = uqff.verify(self.home, deep=True, strict=True)
        if found.clean:
            uqff.inspect(self.home)
            uqff.checksum(self.home, layers=True)
        return ", ".join(sorted({violation.problem for violation in found}))

    def gguf(self, data: bytes) -> None:
        path = self.home / self.name
        path.write_bytes(data)
        with open_gguf(path) as file:
            for tensor in file.values():
                if tensor.block_type is not None and tensor.shape and tensor.nbytes < 1 << 20:
                    tensor.record().dequantize()
            for value in file.pairs.values():
                if hasattr(value.value, "values"):
                    value.value.values()
            tokenizer_files(file, {"max_position_embeddings": 8, "bos_token_id": 1})


def _vectors(suffix: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(VECTORS.rglob(f"*{suffix}")) if path.stat().st_size <= MOST_SEED]


def targets(folder: Path) -> list[Target]:
    """All of them; models to begin with are made in a folder."""
    tiny = TinyModel(hidden_size=32, intermediate_size=32, heads=2, vocab_size=32)
    tiny.write(folder / "checkpoint")
    for name, version in (("v1", "1.2"), ("v0", "0.2")):
        uqff.quantize_model(folder / "checkpoint", folder / name, "q8_0", version=version, measure=False)
    uqff.convert(folder / "v1", folder / "m.gguf", to="gguf")
    files = _vectors(".uqff")
    residual = (folder / "v1" / "residual.safetensors").read_bytes()
    report = (folder / "v1" / "uqff_report.json").read_bytes()
    configs = [json.dumps(json.loads((folder / "v1" / "config.json").read_bytes())).encode()]
    return [
        Target("blobs", "bytes", _vectors(".bin"), _blob),
        Target("framing", "safetensors", [*files, residual], lambda data: parse_header(memoryview(data))),
        Target("containers", "safetensors", files, _Directory(None, "m.uqff").read),
        Target("residual", "safetensors", [residual], _Directory(folder / "v1", "residual.safetensors").verify),
        Target("GGUF", "bytes", [(folder / "m.gguf").read_bytes()], _Directory(None, "m.gguf").gguf),
        Target("config.json, 1.x", "json", configs, _Directory(folder / "v1", "config.json").verify),
        Target("config.json, 0.x", "json", configs, _Directory(folder / "v0", "config.json").verify),
        Target("report", "json", [report], _Directory(folder / "v1", "uqff_report.json").verify),
        Target("recipes", "lines", list(RECIPES), _recipe),
    ]
