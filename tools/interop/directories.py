"""The package's model directories against the client's: whole files, for `tools/interop`.

The client quantises a checkpoint into a directory of UQFF 1.2, and so does `quantize_model`. Of the `.uqff` file and of
the residual, the headers must be equal but for `__metadata__`, entry by entry in their order, and the data to the last
byte, zero signs aside; of the report, everything but who made it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import uqff
from tools.golden.v1 import TinyMixtral
from tools.interop.stored_parts import compare, entries, read_parts, version_entries
from tools.tiny import architectures as tiny_architectures
from uqff.quantization.recipe import load_recipe
from uqff.quantization.run import quantize_model
from uqff.quantization.types import KINDS

VERSION = "0.9.5"
"""The client whose directories are compared."""

REPORT, RESIDUAL = "uqff_report.json", "residual.safetensors"
METADATA = {"uqff.version": "1.2.0"}
"""What both say in `__metadata__`."""


class Directory(NamedTuple):
    """What a directory holds: its file of layers, its residual, its report."""

    layers: bytes
    residual: bytes
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DirectoryCase:
    """A checkpoint that is compared as a directory only, and the types for that.

    `architecture` is the client's name of it; `write` puts the checkpoint into a folder. `recipe` is a topology, which
    both go by.
    """

    name: str
    architecture: str
    dtype: str
    kinds: tuple[str, ...]
    write: Callable[[Path], None]
    recipe: str = ""


def _architecture(name: str, kinds: tuple[str, ...], *, joined: bool = False) -> DirectoryCase:
    def write(folder: Path) -> None:
        tiny_architectures.write(name, folder, joined=joined)

    return DirectoryCase(f"{name}, joined" if joined else name, name, "F32", kinds, write)


def _mixtral(name: str, dtype: str, **sizes: Any) -> DirectoryCase:
    return DirectoryCase(name, "mixtral", dtype, KINDS, TinyMixtral(**sizes).write)


PATTERNS = (
    "gate_proj",
    "down_proj",
    "gate",
    r"experts\.down_proj",
    r"experts\.0\.(w2|up_proj)",
    r"experts\.1\.",
    r"gate_up_proj\.weight$",
)
"""What experts might be called by: their key in the file, the first's name, another's, the joined tensor's."""


def _recipes(name: str, *, joined: bool) -> Iterator[DirectoryCase]:
    """A case for each pattern, and one of entries that have no type."""
    texts = {pattern: f"{json.dumps(f'/{pattern}/')}:\n  isq: q4_0\n" for pattern in PATTERNS}
    texts["no type"] = "0-3:\n  isq: q5_0\n/k_proj/:\n  isq:\n/q_proj/:\n  device: cpu\n"
    for pattern, text in texts.items():
        case = _architecture(name, ("q8_0",), joined=joined)
        yield dataclasses.replace(case, name=f"{case.name}, {pattern}", recipe=text)


CASES = (
    _mixtral("mixtral", "F32", hidden_size=256, intermediate_size=256, heads=8, experts=3),
    _mixtral("mixtral 64, 40 bf16", "BF16", hidden_size=64, intermediate_size=40, experts=3),
    *(_architecture(name, ("q8_0",)) for name in tiny_architectures.CONFIGS if name != "Qwen3Moe"),
    _architecture("Qwen3Moe", ("q8_0", "q5k", "afq6", "hqq8")),
    _architecture("Qwen3Moe", ("q4_0",), joined=True),
    _architecture("Mixtral", ("q4_0",), joined=True),
    *(case for name in ("Mixtral", "Qwen3Moe") for joined in (False, True) for case in _recipes(name, joined=joined)),
)
"""Experts of every type, of sizes that are multiples of 256 and of 8 only; every architecture; joined experts; what
patterns of a topology call experts.
"""


def read_directory(folder: Path, layers: str) -> Directory:
    """What is in a folder; `layers` is the name of the `.uqff` file."""
    rows, residual = ((folder / name).read_bytes() for name in (layers, RESIDUAL))
    return Directory(rows, residual, json.loads((folder / REPORT).read_bytes()))


class DirectoryDifference(NamedTuple):
    """How two directories differ: totals of the file of layers and the residual, and a line for each difference."""

    layers: int
    size: int
    differing: int
    zero_signs: int
    problems: list[str]


def make(checkpoint: Path, kind: str, dtype: str, recipe: Path | None = None) -> Directory:
    """The directory that this package makes of a checkpoint.

    Raises uqff.UqffError if it refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "made")
        made = quantize_model(
            checkpoint,
            folder,
            [kind],
            version="1.2",
            recipe=None if recipe is None else load_recipe(recipe),
            dtype=dtype.lower(),
            engine_biases=True,
            on_fallback=lambda fallback: None,
        )
        return read_directory(folder, *made.outputs[0].shards)


def compare_directories(theirs: Directory, ours: Directory) -> DirectoryDifference:
    """Compare the client's directory with the package's. `size` is in the client's bytes, headers included."""
    differing = zero_signs = 0
    problems: list[str] = []
    for what, file, own in zip(("layers", "residual"), theirs[:2], ours[:2], strict=True):
        header, data = _split(file)
        own_header, own_data = _split(own)
        for each in (header, own_header):
            metadata = each.pop("__metadata__", {})
            if not METADATA.items() <= metadata.items():
                problems.append(f"{what}: __metadata__ is {metadata}")
        if list(header.items()) != list(own_header.items()):
            names = sorted(header.keys() ^ own_header.keys()) or ["order, shapes or places"]
            problems.append(f"{what}: headers differ: {', '.join(names[:5])}")
        if data != own_data:
            parts, signs, lines = _differing_parts(file, own, layers=what == "layers")
            differing, zero_signs = differing + parts, zero_signs + signs
            problems += [f"{what}: {line}" for line in lines]
    problems += _report_problems(theirs.report, ours.report)
    layers = int(theirs.report["outputs"][0]["layers"])
    return DirectoryDifference(layers, len(theirs.layers) + len(theirs.residual), differing, zero_signs, problems)


def _split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def _differing_parts(theirs: bytes, ours: bytes, *, layers: bool) -> tuple[int, int, list[str]]:
    """Bytes that differ, zeros of another sign, and a line for each part with the former."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = folder / "theirs.uqff", folder / "ours.uqff"
        for path, data in zip(paths, (theirs, ours), strict=True):
            path.write_bytes(data)
        stored, expected = read_parts(paths[0]), read_parts(paths[1])
        if layers:
            with uqff.open(paths[1]) as file:
                expected = version_entries()
                for key in file:
                    expected |= entries(key, file[key])
    differing = zero_signs = 0
    lines = []
    for name in dict.fromkeys((*stored, *expected)):
        found = compare(stored.get(name), expected.get(name))
        differing, zero_signs = differing + found.differing, zero_signs + found.zero_signs
        if found.differing:
            lines.append(f"{name}: {found.differing:,} of {found.size:,} bytes differ, first at {found.first}")
    return differing, zero_signs, lines


def _report_problems(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """What the reports say differently, all fields and their order; who made them aside."""
    for name in dict.fromkeys((*theirs, *ours)):
        if name == "generated_by":
            continue
        said, made = json.dumps(theirs.get(name)), json.dumps(ours.get(name))
        if said != made:
            at = next((i for i, (a, b) in enumerate(zip(said, made, strict=False)) if a != b), 0)
            start = max(0, at - 40)
            yield f"report: {name} is {said[start : at + 40]}, expected {made[start : at + 40]}"
