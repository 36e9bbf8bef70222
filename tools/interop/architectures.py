"""Every architecture, quantised by this package and by the client from the same checkpoint, for `tools/interop`.

Required: the same entries, byte for byte, the same tensors in the residual, and the same files beside. Known to differ,
and no fault of the file: :data:`WITHOUT_BIAS`, :data:`RENAMED`, and what `tools.tiny.multimodal` declares. What the
client cannot write, or not read again as it writes it, it must load and run as this package writes it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

import uqff
from tools.interop.client import Client, ClientError
from tools.interop.entries import compare_entries
from tools.interop.few import few_of_each
from tools.tiny import multimodal, text
from tools.tiny.multimodal import MULTIMODALS
from uqff.codec.layer import Layer
from uqff.quantization.run import quantize_model

KINDS = ("q4k", "q8_0", "afq4")
MULTIMODAL_KINDS = ("q4k",)
"""Those of Q8_0 are golden."""
WITHOUT_BIAS = {"Phi-2": "lm_head"}
"""A layer whose bias the client drops when it quantises; it adds it to products when it finds it in a file."""
RENAMED = {"Phi-2": ("model.final_layernorm.", "model.norm.")}
"""Tensors that the client writes into the residual by another name, by which it does not find them again."""
PATIENCE = 600.0
"""Seconds for a model of hundreds of megabytes."""
NOT_WRITTEN = ("GLM-4",)
"""The client fails: 'Duplicate UQFF tensor key'."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An architecture in a type: how many layers were compared, in how many bytes, and what differs."""

    name: str
    kind: str
    layers: int = 0
    size: int = 0
    said: str = ""
    problem: str | None = None


def check(client: Client, name: str, kind: str, checkpoint: Path, scratch: Path) -> Row:
    """Quantise by both; `scratch` is an empty folder."""
    architecture = (MULTIMODALS.get(name) or text.TEXTS[name]).client
    loader = multimodal.LOADER if name in MULTIMODALS else "Plain"
    if name in MULTIMODALS and MULTIMODALS[name].fixed:
        client = dataclasses.replace(client, timeout=PATIENCE)
    made = quantize_model(checkpoint, scratch / "ours", [kind], dtype="f32")
    ours = scratch / "ours" / made.outputs[0].shards[0]
    try:
        if name in NOT_WRITTEN:
            said = client.generate(ours.parent, [ours.name], architecture=architecture, dtype="F32", tokens=4)
            return Row(name, kind, said=f"the client writes none, runs ours: {' '.join(said.tokens)}")
        theirs = client.write(
            checkpoint, scratch / "theirs" / "0.uqff", architecture=architecture, dtype="F32", isq=kind, kind=loader
        )
        known = "but for the bias of the head and names of norms" if name in WITHOUT_BIAS else ""
        if name in {*multimodal.RENAMED, *multimodal.SUPERFLUOUS, *multimodal.FORGOTTEN}:
            known = f"but for tensors of the residual; it {_use(client, ours, architecture, loader)} ours"
    except ClientError as error:
        return Row(name, kind, problem=error.reason)
    beside = sorted({each.name for each in theirs.parent.iterdir()} - {theirs.name} - set(os.listdir(ours.parent)))
    residual = theirs.with_name("residual.safetensors")
    if name in MULTIMODALS:
        multimodal.readable_residual(name, residual, residual)
    with uqff.open(theirs) as a, uqff.open(as_the_client(name, ours, ours.parent)) as b:
        compared = compare_entries(a, b)
        differing = [each.key for each in compared if each.differing]
        keys = {*a.residual, *b.residual} - {*multimodal.FORGOTTEN.get(name, ())}
        differing += [key for key in sorted(keys) if not _same(name, a, b, key)]
    problem = f"{', '.join([*differing, *beside][:3])} differ" if differing or beside else None
    return Row(name, kind, len(compared), sum(each.size for each in compared), known, problem)


def _use(client: Client, file: Path, architecture: str | None, loader: str) -> str:
    """What the client does with a file: at least it must load it."""
    how: dict[str, Any] = {"architecture": architecture, "dtype": "F32", "kind": loader}
    try:
        client.generate(file.parent, [file.name], tokens=1, **how)
    except ClientError:
        client.load(file.parent, [file.name], **how)
        return "loads"
    return "runs"


def as_the_client(name: str, file: Path, folder: Path) -> Path:
    """The file, or one in a folder, without the bias that the client drops."""
    if name not in WITHOUT_BIAS:
        return file
    with uqff.open(file) as model:
        layers = {key: Layer(each.weight) if key == WITHOUT_BIAS[name] else each for key, each in model.items()}
        made = uqff.save(layers, folder / "as-the-client.uqff", version=model.version)
        return made[0]


def _same(name: str, theirs: uqff.UqffFile, ours: uqff.UqffFile, key: str) -> bool:
    """Whether a tensor of either residual is in both."""
    renamed = RENAMED.get(name)
    own, other = renamed or ("", "")
    mine = key.replace(other, own) if renamed else key
    theirs_key = mine.replace(own, other) if renamed else key
    if mine not in ours.residual or theirs_key not in theirs.residual:
        return False
    a, b = theirs.residual[theirs_key], multimodal.rounded(name, mine, ours.residual[mine])
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def all_jobs(kinds: Sequence[str] = (), *, few: bool = False) -> list[tuple[str, str]]:
    """Architectures and kinds, those in `kinds` if there are any there; `few` of them, if so asked."""
    jobs = [(name, kind) for name in filter(text.has, text.TEXTS) for kind in KINDS]
    jobs += [(name, kind) for name in filter(multimodal.has, MULTIMODALS) for kind in MULTIMODAL_KINDS]
    jobs = [(name, kind) for name, kind in jobs if not kinds or kind in kinds]
    return few_of_each(jobs, lambda job: job[0], len(KINDS)) if few else jobs


def check_all(client: Client, jobs: Sequence[tuple[str, str]], folder: Path) -> Iterator[Row]:
    """The rows of the jobs, two at a time. `folder` is for checkpoints and files."""
    places = {name: folder / str(number) for number, name in enumerate(dict.fromkeys(name for name, _ in jobs))}
    for name, place in places.items():
        if name in MULTIMODALS:
            multimodal.write(name, place / "model", whole=True)
        else:
            text.write(name, place / "model")

    def run(job: tuple[str, str]) -> Row:
        name, kind = job
        scratch = places[name] / kind
        (scratch / "theirs").mkdir(parents=True)
        return check(client, name, kind, places[name] / "model", scratch)

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(run, jobs)


def table_of(rows: list[Row]) -> Table:
    """All rows."""
    table = Table(title="Architectures: 1.2 files of this package and of the client, from the same checkpoint")
    for column in ("architecture", "kind", "layers", "bytes"):
        table.add_column(column, no_wrap=True)
    table.add_column("same")
    for row in rows:
        same = f"yes {row.said}".strip() if row.problem is None else f"[red]{row.problem}[/red]"
        table.add_row(row.name, row.kind, str(row.layers), f"{row.size:,}", same)
    return table
