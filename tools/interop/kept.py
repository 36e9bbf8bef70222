"""Checkpoints that others quantised, kept as they are, for `tools/interop`.

A tiny Llama in the layout of each method that UQFF has a form for becomes a 1.2 directory by `--isq keep`. The 0.9.5
client answers from that; this package runs the checkpoint itself, without UQFF, on 1 and 2 ranks. Required are the same
greedy tokens, and log probabilities within `running.DENSE`: either multiplies with the numbers of the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rich.table import Table

from tools.interop import running
from tools.interop.client import Client, ClientError
from tools.tiny.models import TinyModel
from tools.tiny.quantised import write_quantised
from uqff.quantization.run import quantize_model

MODEL: Final = TinyModel("llama", hidden_size=128, intermediate_size=128, heads=4, kv_heads=2, std=0.08, seed=61)
METHODS: Final = ("mlx", "fp8", "mxfp4", "hqq", "gptq", "compressed-tensors")
CLIENT_VERSION: Final = "0.9.5"
WORLDS: Final = (1, 2)


def check_all(client: Client, folder: Path) -> list[running.Row]:
    """The rows of all methods. `folder` is for checkpoints and files."""
    MODEL.write(folder / "plain")
    cases = []
    for method in METHODS:
        source = write_quantised(method, folder / "plain", folder / method)
        made = quantize_model(source, folder / f"{method}-kept", "keep")
        shards = [shard for output in made.outputs for shard in output.shards]
        try:
            answer = client.generate(made.path, shards, architecture="llama", dtype="F32", tokens=running.TOKENS)
            cases.append(running.Case(CLIENT_VERSION, "llama", method, source, answer))
        except ClientError as exc:
            cases.append(running.Case(CLIENT_VERSION, "llama", method, source, None, exc.reason))
    return running.compare_all(cases, [WORLDS for _ in cases], folder)


def failed(rows: list[running.Row]) -> list[running.Row]:
    """Those that differ; a client that cannot run one of these has failed, too."""
    return [row for row in rows if not row.equal or row.case.generation is None]


def table_of(rows: list[running.Row]) -> Table:
    """All rows."""
    table = Table(
        title=f"Kept: quantised checkpoints on {' and '.join(map(str, WORLDS))} ranks, and the client's answers"
    )
    for column in ("client", "model", "source", "on all ranks"):
        table.add_column(column, no_wrap=True)
    table.add_column("the client, from what was kept")
    for row in rows:
        table.add_row(*row.row())
    return table
