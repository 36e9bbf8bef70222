"""Regenerate `tests/golden/v1`: the families that 0.6.0 does not write, as a 1.x client writes them.

python tools/golden_v1.py --client VENV/bin/python            # write everything
python tools/golden_v1.py --client VENV/bin/python --check    # write nothing, exit 1 if a byte would differ
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
from client import Client
from tiny_models import TinyModel

CLIENT_VERSION = "0.9.5"
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "v1"

CASES = {
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
"""Directory to checkpoint, load dtype and ISQ types."""


@click.command()
@click.option("--client", "python", type=click.Path(path_type=Path), required=True, help="Interpreter of the client.")
@click.option("--check", is_flag=True, help="Compare, do not write.")
def main(python: Path, check: bool) -> None:
    """Write the golden files and their index, or compare with what is there."""
    client = Client(python)
    version = client.about()["version"]
    if version != CLIENT_VERSION:
        raise click.ClickException(f"expected mistralrs {CLIENT_VERSION}, got {version}")
    manifest: dict[str, Any] = {"client": f"mistralrs {version}", "uqff_version": "1.2.0", "directories": {}}
    different: list[Path] = []
    for name, (model, dtype, kinds) in CASES.items():
        files = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model.write(folder)
            for kind in kinds:
                written = client.write(
                    folder, folder / f"{kind}.uqff", architecture=model.architecture, dtype=dtype, isq=kind
                ).read_bytes()
                files[f"{kind}-0.uqff"] = {
                    "isq": kind,
                    "bytes": len(written),
                    "sha256": hashlib.sha256(written).hexdigest(),
                }
                path = GOLDEN / name / f"{kind}-0.uqff"
                if not check:
                    _put(path, written)
                elif not path.exists() or _content(path.read_bytes()) != _content(written):
                    different.append(path)
        manifest["directories"][name] = {"model": dataclasses.asdict(model), "dtype": dtype, "files": files}
    if not check:
        _put(GOLDEN / "MANIFEST.json", json.dumps(manifest, indent=1).encode() + b"\n")
    for path in different:
        click.echo(f"differs: {path}")
    sys.exit(1 if different else 0)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _content(file: bytes) -> tuple[Any, bytes]:
    """Header, in no order, and data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


if __name__ == "__main__":
    main()
