"""Regenerate `tests/golden/v1`: files of the 1.x generation, as the real clients write them.

    python -m tools.golden.v1 --client VENV/bin/python            # write everything of that client's version
    python -m tools.golden.v1 --client VENV/bin/python --check    # write nothing, exit 1 if a tensor would differ

Run it once for each client of `CLIENTS`. `quantizers` (the directories without a version) is what the tests of the F8Q8
and MXFP4 quantisers compare with; it is written with the client of 1.2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from tools.golden.v0 import CASES as V0_CASES
from tools.interop.client import Client
from tools.tiny.models import TinyModel

GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "golden" / "v1"

CLIENTS = {"0.8.12": "1.0.0", "0.8.23": "1.1.0", "0.9.5": "1.2.0"}
"""Client to the format version that it writes."""

REPORT = "uqff_report.json"


@dataclasses.dataclass(frozen=True)
class TinyMixtral(TinyModel):
    """A mixture of experts, which 1.x files store stacked."""

    architecture: Any = "mixtral"
    hidden_size: int = 64
    intermediate_size: int = 32
    heads: int = 2
    vocab_size: int = 16
    seed: int = 41
    experts: int = 2

    def __post_init__(self) -> None:
        """Nothing to check: the parameters are these."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TinyModel.shapes`."""
        shapes = {name: shape for name, shape in super().shapes().items() if ".mlp." not in name}
        moe, hidden, inner = "model.layers.0.block_sparse_moe", self.hidden_size, self.intermediate_size
        shapes[f"{moe}.gate.weight"] = (self.experts, hidden)
        for expert in range(self.experts):
            shapes[f"{moe}.experts.{expert}.w1.weight"] = (inner, hidden)
            shapes[f"{moe}.experts.{expert}.w2.weight"] = (hidden, inner)
            shapes[f"{moe}.experts.{expert}.w3.weight"] = (inner, hidden)
        return shapes

    def config(self) -> dict[str, Any]:
        """See `TinyModel.config`."""
        experts = {"num_local_experts": self.experts, "num_experts_per_tok": 1}
        mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        return super().config() | experts | mixtral


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint, the dtype it is loaded in, and the ISQ types it is quantised to, by format version.

    `topology` maps a range of decoder layers to an ISQ type or None; `v0` names the directory of `tests/golden/v0` of
    the same weights.
    """

    name: str
    why: str
    model: TinyModel
    dtype: str
    kinds: dict[str, tuple[str, ...]]
    topology: dict[str, str | None] | None = None
    v0: str | None = None


def of_v0(name: str, why: str, kinds: dict[str, tuple[str, ...]]) -> Case:
    """The weights, dtype and topology of a case of `golden.py`."""
    case = next(case for case in V0_CASES if case.name == name)
    return Case(name, why, case.model, case.dtype, kinds, case.topology, f"v0/{name}")


def everywhere(*kinds: str) -> dict[str, tuple[str, ...]]:
    """The same types for every version."""
    return dict.fromkeys(CLIENTS.values(), kinds)


_SOME = ("q4_0", "hqq4", "fp8", "afq3", "afq4")
_ALL = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "hqq4", "hqq8", "fp8", "afq2", "afq3", "afq4", "afq6", "afq8")

QUANTIZER_CASES = {
    "llama-edge-32-f32": (
        TinyModel("llama", hidden_size=32, intermediate_size=64, heads=1, vocab_size=16, edge_rows=True, seed=21),
        "F32",
        ("f8q8", "mxfp4"),
    ),
    "qwen2-40-bf16": (
        TinyModel("qwen2", hidden_size=40, intermediate_size=24, heads=2, vocab_size=33, seed=22),
        "BF16",
        ("f8q8",),
    ),
}
"""Directory to checkpoint, load dtype and ISQ types; written by the client of 1.2."""

CASES = (
    of_v0(
        "llama-edge-64-f32",
        "the weights that 0.6.0 quantised too",
        {"1.0.0": _SOME, "1.1.0": _SOME, "1.2.0": _ALL},
    ),
    of_v0(
        "llama-edge-256-f32",
        "the same for K quants",
        {"1.0.0": ("q2k",), "1.1.0": ("q2k",), "1.2.0": ("q2k", "q4k")},
    ),
    of_v0("qwen2-f16", "biases; F16", {"1.0.0": ("fp8",), "1.1.0": ("afq4",), "1.2.0": ("fp8", "afq4")}),
    Case(
        "mixtral-64-f32",
        "stacked experts",
        TinyMixtral(),
        "F32",
        {"1.0.0": ("q4_0",), "1.1.0": ("q4_0", "fp8", "hqq8", "f8q8"), "1.2.0": ("q4_0", "afq2")},
    ),
    Case(
        "llama-32-f32",
        "F8Q8 and MXFP4",
        TinyModel("llama", hidden_size=32, intermediate_size=32, heads=1, vocab_size=16, seed=31),
        "F32",
        everywhere("f8q8", "mxfp4"),
    ),
    Case(
        "llama-32-tied-f32",
        "tied: 1.0 and 1.1 store an lm_head, 1.2 stores model.embed_tokens",
        TinyModel("llama", hidden_size=32, intermediate_size=32, heads=1, vocab_size=16, tied=True, seed=32),
        "F32",
        everywhere("hqq4"),
    ),
    Case(
        "qwen2-mixed-bf16",
        "four families and biases in a file; a topology that 0.8.12 cannot write",
        TinyModel("qwen2", hidden_size=64, intermediate_size=32, heads=2, layers=3, vocab_size=8, seed=33),
        "BF16",
        {"1.1.0": ("q8_0",), "1.2.0": ("q8_0",)},
        {"0": "afq4", "1": "hqq4", "2": "q8_0"},
    ),
    Case(
        "qwen2-40-f16",
        "in-dim 40: Q types are stored as ggml F32, AFQ as unquantised (not in 1.0)",
        TinyModel("qwen2", hidden_size=40, intermediate_size=24, heads=2, vocab_size=16, seed=34),
        "F16",
        {"1.0.0": ("q4_0",), "1.1.0": ("q4_0", "afq4"), "1.2.0": ("q4_0", "afq4")},
    ),
)


def write(client: Client, model: TinyModel, dtype: str, kind: str, topology: Any = None) -> tuple[bytes, bytes | None]:
    """Let the client quantise a checkpoint; the bytes of the file, and of the report beside it if there is one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch, "model"), Path(scratch, "out")
        model.write(folder)
        output.mkdir()
        chosen = None
        if topology is not None:
            chosen = Path(scratch, "topology.yml")
            chosen.write_text(json.dumps({key: {} if isq is None else {"isq": isq} for key, isq in topology.items()}))
        written = client.write(
            folder, output / f"{kind}.uqff", architecture=model.architecture, dtype=dtype, isq=kind, topology=chosen
        )
        report = output / REPORT
        return written.read_bytes(), report.read_bytes() if report.exists() else None


@click.command()
@click.option("--client", "python", type=click.Path(path_type=Path), required=True, help="Interpreter of the client.")
@click.option("--check", is_flag=True, help="Compare, do not write.")
def main(python: Path, check: bool) -> None:
    """Write the golden files of a client and their index, or compare with what is there."""
    client = Client(python, timeout=180.0)
    about = client.about()
    if about["version"] not in CLIENTS:
        raise click.ClickException(f"expected mistralrs {' or '.join(CLIENTS)}, got {about['version']}")
    version = CLIENTS[about["version"]]
    different = _versioned(client, about, version, check)
    if version == "1.2.0":
        different += _quantizers(client, about["version"], check)
    for path in different:
        click.echo(f"differs: {path}")
    sys.exit(1 if different else 0)


def _versioned(client: Client, about: dict[str, str], version: str, check: bool) -> list[Path]:
    manifest: dict[str, Any] = {
        "client": f"mistralrs {about['version']}",
        "uqff_version": version,
        "platform": f"{about['system']} {about['machine']}, {about['libc']}, CPU",
        "command": "python -m tools.golden.v1 --client PYTHON",
        "directories": {},
    }
    different: list[Path] = []
    for case in CASES:
        files: dict[str, Any] = {}
        for kind in case.kinds.get(version, ()):
            written, report = write(client, case.model, case.dtype, kind, case.topology)
            name = f"{kind}-0.uqff"
            folder = GOLDEN / version / case.name
            different += _keep(folder / name, written, check)
            files[name] = _about(kind, folder / name)
            click.echo(f"{version} {case.name} {name} {len(written)}")
            if report is not None:
                different += _keep(folder / f"{kind}.{REPORT}", report, check)
        if files:
            manifest["directories"][case.name] = {
                "why": case.why,
                "model": dataclasses.asdict(case.model),
                "model_sha256": case.model.sha256(),
                "dtype": case.dtype,
                "topology": case.topology,
                "v0": case.v0,
                "files": files,
            }
    if not check:
        _put(GOLDEN / version / "MANIFEST.json", json.dumps(manifest, indent=1).encode() + b"\n")
    return different


def _quantizers(client: Client, version: str, check: bool) -> list[Path]:
    manifest: dict[str, Any] = {"client": f"mistralrs {version}", "uqff_version": "1.2.0", "directories": {}}
    different: list[Path] = []
    for name, (model, dtype, kinds) in QUANTIZER_CASES.items():
        files = {}
        for kind in kinds:
            written, _ = write(client, model, dtype, kind)
            path = GOLDEN / name / f"{kind}-0.uqff"
            different += _keep(path, written, check)
            files[path.name] = _about(kind, path)
        manifest["directories"][name] = {"model": dataclasses.asdict(model), "dtype": dtype, "files": files}
    if not check:
        _put(GOLDEN / "MANIFEST.json", json.dumps(manifest, indent=1).encode() + b"\n")
    return different


def _about(kind: str, path: Path) -> dict[str, Any]:
    """What the index says of a file that is there; one that only differs in the order of its metadata was kept."""
    data = path.read_bytes() if path.exists() else b""
    return {"isq": kind, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _keep(path: Path, content: bytes, check: bool) -> list[Path]:
    """Write a file, or name it if what is there differs by more than the order of its metadata."""
    if not check:
        if path.exists() and _content(path.read_bytes()) == _content(content):
            return []
        _put(path, content)
        return []
    return [] if path.exists() and _content(path.read_bytes()) == _content(content) else [path]


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _content(file: bytes) -> tuple[Any, bytes]:
    """Header, in no order, and data of a safetensors file; of a report, its values."""
    if file.startswith(b"{"):
        return json.loads(file), b""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


if __name__ == "__main__":
    main()
