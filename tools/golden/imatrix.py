"""Regenerate `tests/golden/imatrix`: what the engine makes of K types with an importance matrix.

    python -m tools.golden.imatrix --client .venvs/mistralrs-0.9.5/bin/python            # write everything
    python -m tools.golden.imatrix --client .venvs/mistralrs-0.9.5/bin/python --check    # exit 1 if a byte would differ

`importance.imatrix` is given to the client in llama.cpp's older form, with a checkpoint of `MODEL`; of each type the
blocks of one layer are kept, `<type>.bin`. The embedding has no entry, and is quantised without.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import numpy as np

import uqff
from tools.interop.client import Client
from tools.tiny.models import TinyModel
from uqff.importance.matrix import InputSquares

GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "golden" / "imatrix"

MODEL = TinyModel(edge_rows=True, std=0.05, seed=11)

LAYER = "model.layers.0.self_attn.k_proj"

KINDS = ("q2k", "q3k", "q4k", "q5k", "q6k")


def importance() -> uqff.Importance:
    """Of every matrix but the embedding: exponential, some inputs a thousand times others."""
    rng = np.random.default_rng(12)
    entries = {}
    for name, shape in MODEL.shapes().items():
        if len(shape) == 2 and "embed_tokens" not in name:
            sums = rng.exponential(1, (1, shape[1])) * 1000.0 ** rng.integers(0, 2, (1, shape[1]))
            entries[name.removesuffix(".weight")] = InputSquares(sums.astype(np.float32), np.array([1]))
    return uqff.Importance(entries)


@click.command()
@click.option("--client", "python", type=click.Path(path_type=Path), required=True, help="Python of mistralrs 0.9.5.")
@click.option("--check", is_flag=True, help="Write nothing.")
def main(python: Path, check: bool) -> None:
    """Run the client once for each type."""
    client, differ = Client(python), []
    with tempfile.TemporaryDirectory() as folder:
        MODEL.write(Path(folder) / "model")
        matrix = Path(folder) / "importance.imatrix"
        importance().save(matrix)
        made = {matrix.name: matrix.read_bytes()}
        for kind in KINDS:
            written = client.write(
                Path(folder) / "model",
                Path(folder) / f"{kind}.uqff",
                architecture="Llama",
                dtype="F32",
                isq=kind,
                imatrix=matrix,
            )
            with uqff.open([written]) as file:
                made[f"{kind}.bin"] = bytes(file[LAYER].weight.parts["data"].array())
    for name, data in made.items():
        path = GOLDEN / name
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        elif path.read_bytes() != data:
            differ.append(name)
    sys.exit(f"differ: {', '.join(differ)}" if differ else None)


if __name__ == "__main__":
    main()
