"""What the client makes of this package's 1.x files, for `tools/interop`: it must take them for its own.

For several tiny models and every ISQ type the 0.9.5 client quantises a checkpoint to a 1.2 file. This package opens it
and writes its layers again: in one file, beside the client's own report; and in several shards, beside a report of its
own, of which the client is given the first. The client then loads all three and generates greedily. Required: the same
entries, byte for byte; of the one file, the same container but for `__metadata__`; equal tokens and equal logprobs.

Where the client cannot run its own file, ours must fail in the same way: the table then has its reason. It is the case
of Q8_1 and Q8K, of FP8 and MXFP4 with biases, and of AFQ experts on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

import uqff
from tools.interop.client import Client, ClientError
from tools.interop.few import few_of_each
from tools.interop.quantisers import GENERATIONS
from tools.interop.reading import LayerComparison, Outcome
from tools.tiny import architectures as tiny_architectures
from tools.tiny.models import TinyModel
from uqff.container.report import REPORT_NAME, build_report, report_document

CLIENT_VERSION = "0.9.5"
UQFF_VERSION = (1, 2, 0)
KINDS = GENERATIONS[CLIENT_VERSION].kinds
MIXED = "mixed"
"""Not an ISQ type: a topology that gives every decoder layer another."""
MIXTURE = {"0": "afq4", "1": "hqq4", "2": "fp8", "3": "q4k"}
SHARDS = 4
"""Into about so many a file is cut."""

RE_SAVED, SHARDED = "re-saved", "sharded"


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint: what writes it, the client's name of its architecture, and the types to quantise it to."""

    architecture: str
    write: Callable[[Path], None]
    kinds: tuple[str, ...] = KINDS


EXPERT_KINDS = (*(kind for kind in KINDS if kind.startswith("q")), "afq4")
"""The client writes no experts in HQQ, FP8, F8Q8 and MXFP4."""
LONGEST_REASON = 70
"""Characters of the client's words that the table has room for."""

MODELS = {
    "llama": Model("llama", TinyModel("llama", intermediate_size=256, layers=2, std=0.08, seed=61).write),
    "qwen2 tied": Model("qwen2", TinyModel("qwen2", intermediate_size=256, std=0.08, tied=True, seed=62).write),
    "qwen2 40": Model(
        "qwen2",
        TinyModel("qwen2", hidden_size=40, intermediate_size=24, heads=2, seed=63).write,
        ("q4k", "q8_0", "afq4", "fp8", "f8q8"),
    ),
    "llama mixed": Model(
        "llama", TinyModel("llama", intermediate_size=256, layers=4, std=0.08, seed=64).write, (MIXED,)
    ),
    "mixtral": Model(
        "mixtral", lambda folder: tiny_architectures.write("Mixtral", folder), ("q4_0", "q8_0", "q4k", "afq4")
    ),
    "qwen3 moe": Model("qwen3moe", lambda folder: tiny_architectures.write("Qwen3Moe", folder), EXPERT_KINDS),
}
"""In-dims that are multiples of 256 or not even of 32; biases; a tied head; experts; four families in a file."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table; `file_equal` is None where the files are meant to differ (another number of shards)."""

    model: str
    kind: str
    made: str
    layers: list[LayerComparison]
    file_equal: bool | None
    theirs: Outcome
    ours: Outcome

    @property
    def equal(self) -> bool:
        """No byte, token or logprob differs."""
        return (
            self.file_equal is not False
            and not any(layer.differing for layer in self.layers)
            and self.theirs == self.ours
        )

    def row(self) -> list[str]:
        """The cells of the table."""
        differing, size = sum(layer.differing for layer in self.layers), sum(layer.size for layer in self.layers)
        if self.theirs != self.ours:
            tokens = f"[red]{self.theirs.difference(self.ours)}[/red]"
        elif self.theirs.generation is None:
            tokens = f"[yellow]neither: {str(self.theirs)[:LONGEST_REASON]}[/yellow]"
        else:
            tokens = f"[green]{self.theirs} and logprobs equal[/green]"
        file = {True: "[green]equal[/green]", False: "[red]differs[/red]", None: "sharded"}[self.file_equal]
        entries = f"[red]{differing:,} of {size:,}[/red]" if differing else f"0 of {size:,}"
        return [self.model, self.kind, self.made, str(len(self.layers)), entries, file, tokens]


def compare_entries(theirs: uqff.UqffFile, ours: uqff.UqffFile) -> list[LayerComparison]:
    """Compare two open models layer by layer, entry by entry: dtype, shape and bytes.

    An entry that differs, or that only one side has, counts with the size of the larger.
    """
    comparisons = []
    for key in sorted({*theirs, *ours}):
        sides = [file.entries(key) if key in file else {} for file in (theirs, ours)]
        size = sum(entry.data.nbytes for entry in sides[0].values())
        differing = 0
        for suffix in sorted({*sides[0], *sides[1]}):
            pair = [side.get(suffix) for side in sides]
            if None in pair or pair[0] != pair[1]:
                differing += max(1, *(entry.data.nbytes for entry in pair if entry is not None))
        kind = (theirs if key in theirs else ours)[key].weight.kind
        comparisons.append(LayerComparison(key, kind, size, differing, None))
    return comparisons


def container(path: Path) -> tuple[list[tuple[str, Any]], bytes]:
    """The header of a file in its order, less `__metadata__`, and its data."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return list(header.items()), data[begin:]


def write_ours(theirs: uqff.UqffFile, our_dir: Path, shard_bytes: int | None = None) -> list[Path]:
    """Write the client's layers as a model directory of ours, with its residual, configuration and tokenizer.

    In one file with the client's report or, if `shard_bytes` is given, in several with one of our own.
    """
    our_dir.mkdir()
    for path in theirs.paths[0].parent.iterdir():
        if path.suffix != ".uqff" and (path.name != REPORT_NAME or shard_bytes is None):
            shutil.copyfile(path, our_dir / path.name)
    name = our_dir / theirs.paths[0].name
    if shard_bytes is None:
        return uqff.save(theirs, name, version=UQFF_VERSION)
    files = uqff.save(theirs, name, version=UQFF_VERSION, shard_bytes=shard_bytes)
    with uqff.open(files[0]) as file:
        (our_dir / REPORT_NAME).write_text(json.dumps(report_document(build_report({"ours": file}))))
    return files


def run_client(client: Client, first: Path, architecture: str) -> Outcome:
    """Let the client load a model by its first shard, and generate."""
    try:
        return Outcome(client.generate(first.parent, [first.name], architecture=architecture, dtype="F32"))
    except ClientError as exc:
        return Outcome(None, exc.reason, exc.loaded)


def check(client: Client, name: str, kind: str, checkpoint: Path, scratch: Path) -> list[Result]:
    """The rows of one kind: the client's file, ours made from it, and what the client makes of each.

    `checkpoint` is the checkpoint's folder, `scratch` an empty one.
    """
    architecture, topology = MODELS[name].architecture, None
    if kind == MIXED:
        topology = scratch / "topology.yml"
        topology.write_text("".join(f"{layer}:\n  isq: {each}\n" for layer, each in MIXTURE.items()))
    written = client.write(
        checkpoint,
        scratch / "client" / "0.uqff",
        architecture=architecture,
        dtype="F32",
        isq="q8_0" if kind == MIXED else kind,
        topology=topology,
    )
    theirs = run_client(client, written, architecture)
    results = []
    with uqff.open(written) as file:
        for made, shard_bytes in ((RE_SAVED, None), (SHARDED, written.stat().st_size // SHARDS)):
            files = write_ours(file, scratch / made, shard_bytes)
            with uqff.open(files[0]) as our_file:
                layers = compare_entries(file, our_file)
            equal = container(written) == container(files[0]) if shard_bytes is None else None
            if shard_bytes is not None and len(files) < 2:
                raise ValueError(f"{name} {kind}: {len(files)} shard")
            results.append(Result(name, kind, made, layers, equal, theirs, run_client(client, files[0], architecture)))
    return results


def all_jobs(kinds: Sequence[str] = (), *, few: bool = False) -> list[tuple[str, str]]:
    """Models and kinds, those in `kinds` if there are any there; `few` of them, if so asked."""
    jobs = [(name, kind) for name, model in MODELS.items() for kind in model.kinds if not kinds or kind in kinds]
    return few_of_each(jobs, lambda job: job[0], 2) if few else jobs


def check_all(client: Client, jobs: Sequence[tuple[str, str]], folder: Path) -> Iterator[Result]:
    """The rows of the jobs, two at a time. `folder` is for checkpoints and files."""
    for name in dict.fromkeys(name for name, _ in jobs):
        MODELS[name].write(folder / name / "model")

    def run(job: tuple[str, str]) -> list[Result]:
        name, kind = job
        scratch = folder / name / kind
        scratch.mkdir()
        return check(client, name, kind, folder / name / "model", scratch)

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(run, jobs):
            yield from results


def table_of(results: list[Result]) -> Table:
    """All rows."""
    table = Table(title="1.x files: the client runs this package's as its own")
    for column in ("model", "kind", "ours is", "layers", "bytes differing", "file"):
        table.add_column(column, no_wrap=True)
    table.add_column("client's generation")
    for result in results:
        table.add_row(*result.row())
    return table
