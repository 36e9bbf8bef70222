"""Regenerate `tests/golden/gguf`: what the real client makes of GGUF files; only `config.json` tells it from others.

    python -m tools.golden.gguf --client VENV/bin/python            # mistralrs 0.9.5
    python -m tools.golden.gguf --client VENV/bin/python --check    # write nothing, exit 1 if a tensor would differ

The rows of Q and K are those of the GGUF file, whose tensors are float32: so the layers are the model's own, quantised,
but for their order. The checkpoint is `MODEL`, which `tiny_models.py` makes; `tiny_gguf.py` makes the GGUF file of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from tools.interop.client import Client
from tools.tiny.gguf import write_gguf
from tools.tiny.models import TinyModel

GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "golden" / "gguf"
MODEL = TinyModel("llama", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, vocab_size=16, seed=51)
KINDS = ("q4_0", "hqq8", "fp8", "afq4")
SHARED = ("config.json", "residual.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CLIENT = "0.9.5"


def files_of(client: Client) -> dict[str, bytes]:
    """The golden files by name, written anew."""
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        MODEL.write(folder / "source")
        write_gguf(MODEL, folder / "theirs.gguf", "f32")
        for kind in KINDS:
            output = folder / kind / f"{kind}.uqff"
            written = client.write_gguf(folder / "theirs.gguf", folder / "source", output, dtype="F32", isq=kind)
            found[written.name] = written.read_bytes()
            for other in SHARED:
                found[other] = (folder / kind / other).read_bytes()
    return found


def content(data: bytes) -> Any:
    """A file without the metadata of its header, which the client writes in any order."""
    if data[:1] == b"{":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return header, data[end:]


def manifest_of(files: dict[str, bytes]) -> dict[str, Any]:
    """What the index says of the files."""
    command = "python -m tools.golden.gguf --client PYTHON"
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    return {"client": f"mistralrs {CLIENT}", "command": command, "model_sha256": MODEL.sha256(), "files": digests}


@click.command()
@click.option("--client", "python", required=True, type=click.Path(path_type=Path), help="Interpreter with mistralrs.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a tensor would differ.")
def main(python: Path, check: bool) -> None:
    """Write the golden files, or compare with them."""
    client = Client(python)
    if client.about()["version"] != CLIENT:
        raise click.ClickException(f"expected mistralrs {CLIENT}, got {client.about()['version']}")
    files = files_of(client)
    if check:
        differ = [name for name, data in files.items() if content((GOLDEN / name).read_bytes()) != content(data)]
        click.echo(f"{len(differ)} of {len(files)} files differ: {', '.join(differ) or '-'}")
        sys.exit(1 if differ else 0)
    files["MANIFEST.json"] = (json.dumps(manifest_of(files), indent=2) + "\n").encode()
    GOLDEN.mkdir(exist_ok=True)
    for name, data in files.items():
        (GOLDEN / name).write_bytes(data)


if __name__ == "__main__":
    main()
