"""The package's quantisers against the client's: every stored byte of every layer, for `tools/interop`.

The client quantises a checkpoint and writes it; the package quantises the same weights, and makes of them what the
client's file must contain. Which type a layer gets is the package's word too (`uqff.quantization.types.plan`): where
it says that the engine fails on a shape, the client must fail, and the other way round.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

import uqff
from tools.interop.cases import CASES as ALL_CASES
from tools.interop.cases import Case
from tools.interop.client import Client, ClientError, NotOnThisCPU
from tools.interop.directories import CASES as DIRECTORY_CASES
from tools.interop.directories import (
    REPORT,
    VERSION,
    Directory,
    DirectoryCase,
    compare_directories,
    make,
    read_directory,
)
from tools.interop.few import few_of_each
from tools.interop.stored_parts import Part, blob_part, compare, entries, read_parts, version_entries
from tools.interop.wheel_q3k import quantize_q3k
from tools.tiny.models import TinyModel
from uqff.families import AFQ, GGUF, MXFP4
from uqff.quantization.bias import cast_bias
from uqff.quantization.types import KINDS, Engine, plan, promoted

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

WHEEL = "0.6.0"
"""The client whose Q3K is not what its source says, see `wheel_q3k`."""


DIRECTORY = "directory"
RECIPE = "recipe.yml"


@dataclasses.dataclass(frozen=True)
class Generation:
    """A released client: which rules of `uqff.quantization.types` it follows, and which types it writes."""

    engine: Engine
    kinds: tuple[str, ...]


GENERATIONS = {
    "0.6.0": Generation("0.6", tuple(kind for kind in KINDS if kind not in ("f8q8", "mxfp4"))),
    "0.9.5": Generation("0.9", KINDS),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    `by`: the kernels, the reference paths, or `DIRECTORY`: what `quantize_model` writes. `refused`: why
    the client wrote nothing; `not_run`: why it could not, on this CPU. `problems`: each part that differs, and what is
    not in a layer's bytes: a refusal of one side only, a report that says otherwise.
    """

    version: str
    case: str
    kind: str
    by: str
    layers: int = 0
    size: int = 0
    differing: int = 0
    zero_signs: int = 0
    refused: str = ""
    problems: tuple[str, ...] = ()
    note: str = ""
    not_run: str = ""

    @property
    def equal(self) -> bool:
        """Nothing differs, zero signs aside."""
        return not self.differing and not self.problems

    def cells(self) -> list[str]:
        """The cells of the table."""
        named = [self.version, self.case, self.kind, self.by]
        if self.not_run:
            return [*named, "-", "-", "-", "-", f"[yellow]{self.not_run}[/yellow]"]
        if self.refused:
            return [*named, "-", "-", "-", "-", f"both refuse: {self.refused}" if self.equal else self.refused]
        differing = f"{self.differing:,}" if not self.differing else f"[red]{self.differing:,}[/red]"
        return [*named, str(self.layers), f"{self.size:,}", differing, f"{self.zero_signs:,}", self.note]


def asked_kinds(case: Case, kind: str, engine: Engine) -> dict[str, str]:
    """The layers that the client stores of a checkpoint, by their path in it, and the type each is asked to have.

    UQFF 1.2 stores the embedding as a layer, tied or not, and promotes it and lm_head.
    """
    names = case.model.layer_names()
    if engine != "0.9":
        return dict.fromkeys(names, kind)
    sensitive = {"model.embed_tokens", names[0]}
    return {name: promoted(kind) if name in sensitive else kind for name in sorted({*names, *sensitive})}


@lru_cache(maxsize=2)
def tensors_of(model: TinyModel) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in float32."""
    return {name: torch.from_numpy(values) for name, values in model.tensors().items()}


def quantise(case: Case, kind: str, engine: Engine) -> dict[str, uqff.Layer]:
    """The layers as this package makes them, by their path in the checkpoint.

    Raises uqff.ShapeError if one of them has a shape on which the engine fails.
    """
    dtype, tensors = TORCH_DTYPES[case.dtype], tensors_of(case.model)
    asked = asked_kinds(case, kind, engine)
    # All shapes before any work: plan raises where the engine fails.
    for name, of in asked.items():
        plan(of, tensors[f"{name}.weight"].shape, engine=engine)
    layers = {}
    for name, of in asked.items():
        weight = uqff.quantize(
            tensors[f"{name}.weight"], of, engine=engine, dtype=dtype, on_fallback=lambda fallback: None
        )
        bias = tensors.get(f"{name}.bias")
        layers[name] = uqff.Layer(weight, None if bias is None else _engine_bias(bias, weight, dtype))
    return layers


def _engine_bias(bias: torch.Tensor, weight: uqff.QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    return cast_bias(bias, weight, dtype, version=(1, 2, 0), engine_biases=True)


def with_wheel_q3k(layers: dict[str, uqff.Layer], case: Case) -> dict[str, uqff.Layer]:
    """The layers with each Q3K weight as the wheel with the defect has it."""
    return {name: _with_wheel_q3k(name, layer, case) for name, layer in layers.items()}


def _with_wheel_q3k(name: str, layer: uqff.Layer, case: Case) -> uqff.Layer:
    weight = layer.weight
    if not isinstance(weight, GGUF) or weight.kind != "q3k":
        return layer
    values = tensors_of(case.model)[f"{name}.weight"].to(TORCH_DTYPES[case.dtype]).to(torch.float32).numpy()
    blocks = torch.from_numpy(quantize_q3k(values.reshape(-1, 256)))
    return uqff.Layer(GGUF(blocks.reshape(weight.data.shape), weight.block_type), layer.bias)


def expected_parts(layers: dict[str, uqff.Layer], case: Case, engine: Engine) -> dict[str, dict[str, Part]]:
    """What the file must contain, by layer and name; the empty path stands for what belongs to no layer."""
    if engine == "0.9":
        return {"": version_entries(), **{name: entries(name, layer) for name, layer in layers.items()}}
    return {name: {str(i): blob_part(layers[name])} for i, name in enumerate(case.model.layer_names())}


class FileDifference(NamedTuple):
    """How a file differs from what it must contain: totals, and a line for each part that does."""

    layers: int
    size: int
    differing: int
    zero_signs: int
    lines: list[str]


def compare_file(stored: Mapping[str, Part], expected: Mapping[str, Mapping[str, Part]]) -> FileDifference:
    """Compare the client's file, part by part, with :func:`expected_parts`. `size` is in the client's bytes."""
    wanted = {name: (layer, part) for layer, parts in expected.items() for name, part in parts.items()}
    found = {
        name: compare(stored.get(name), wanted[name][1] if name in wanted else None) for name in (*wanted, *stored)
    }
    lines = []
    for name, each in found.items():
        if each.differing:
            layer = wanted[name][0] if name in wanted else "in the client's file only"
            lines.append(f"{layer}: {name}: {each.differing:,} of {each.size:,} bytes differ, first at {each.first}")
    size, differing, zero_signs = (sum(counts) for counts in list(zip(*found.values(), strict=True))[:3])
    return FileDifference(len(expected.keys() - {""}), size, differing, zero_signs, lines)


def check_report(report: dict[str, Any] | None, layers: dict[str, uqff.Layer], case: Case, kind: str) -> list[str]:
    """Where the client's `uqff_report.json` and the package disagree about the layers' types."""
    if report is None:
        return [f"the client wrote no {REPORT}"]
    (output,) = report["outputs"]
    asked = asked_kinds(case, kind, "0.9")
    said = {
        layer["module"]: (layer["default_target"], layer["resolved_target"], layer["stored"], tuple(layer["shape"]))
        for layer in output["layer_details"]
    }
    made = {name: (kind, asked[name], layer.weight.kind, reported_shape(name, layer)) for name, layer in layers.items()}
    problems = [
        f"report: {name} is {said.get(name)}, expected {made.get(name)}"
        for name in sorted({*said, *made})
        if said.get(name) != made.get(name)
    ]
    dense = {name: asked[name] for name, layer in layers.items() if layer.weight.kind in ("f32", "unquant")}
    facts = {
        "quant": (output["quant"], kind),
        "layers": (output["layers"], len(layers)),
        "actual_counts": (output["actual_counts"], dict(Counter(layer.weight.kind for layer in layers.values()))),
        "fallback_count": (output["fallback_count"], len(dense)),
        "fallbacks": ({each["module"]: each["from"] for each in output.get("fallbacks", [])}, dense),
        "uqff_version": (report["uqff_version"], "1.2.0"),
    }
    return problems + [
        f"report: {fact} is {theirs}, expected {ours}" for fact, (theirs, ours) in facts.items() if theirs != ours
    ]


def reported_shape(name: str, layer: uqff.Layer) -> tuple[int, ...]:
    """A weight's shape as `uqff_report.json` has it: that of the packed codes where the logical one is not stored."""
    if isinstance(layer.weight, AFQ | MXFP4):
        return entries(name, layer)[f"{name}.weight"].shape
    return layer.weight.shape


@dataclasses.dataclass(frozen=True)
class Written:
    """What the client made of one checkpoint and type: its tensors, report and files, or why there are none."""

    parts: dict[str, Part]
    report: dict[str, Any] | None = None
    refused: str = ""
    directory: Directory | None = None
    not_run: str = ""


class Job(NamedTuple):
    """A checkpoint for a client: `case` is None if only directories are compared, `recipe` if all get one type."""

    version: str
    name: str
    architecture: str
    dtype: str
    kind: str
    checkpoint: Path
    case: Case | None
    recipe: Path | None = None

    @property
    def checkpoints(self) -> tuple[str, bool]:
        """What is the same of all types of a checkpoint, and of all recipes for an architecture."""
        return (self.name, False) if self.recipe is None else (self.name.rpartition(", ")[0], True)


def let_client_write(client: Client, job: Job) -> Written:
    """Let the client quantise a checkpoint into a folder in it, and take in what it wrote."""
    scratch = job.checkpoint / f"{job.version}-{job.kind}"
    try:
        written = client.write(
            job.checkpoint,
            scratch / f"{job.kind}.uqff",
            architecture=job.architecture,
            dtype=job.dtype,
            isq=job.kind,
            topology=job.recipe,
        )
    except NotOnThisCPU as exc:
        return Written({}, not_run=exc.reason)
    except ClientError as exc:
        return Written({}, refused=exc.reason)
    directory = read_directory(scratch, written.name) if (scratch / REPORT).exists() else None
    made = Written(read_parts(written), directory.report if directory else None, directory=directory)
    shutil.rmtree(scratch)
    return made


def check(version: str, case: Case, kind: str, written: Written, *, by: str = "kernels") -> Row:
    """Compare what the client wrote with what this package makes of the same checkpoint."""
    engine = GENERATIONS[version].engine
    row = Row(version, case.name, kind, by)
    if written.not_run:
        return dataclasses.replace(row, not_run=written.not_run)
    try:
        layers = quantise(case, kind, engine)
    except uqff.ShapeError as exc:
        if written.refused:
            return dataclasses.replace(row, refused=written.refused)
        return dataclasses.replace(
            row, refused=str(exc), problems=(f"the package refuses, the client does not: {exc}",)
        )
    if written.refused:
        problem = f"the client refuses, the package does not: {written.refused}"
        return dataclasses.replace(row, refused=written.refused, problems=(problem,))
    found = compare_file(written.parts, expected_parts(layers, case, engine))
    note = ""
    if version == WHEEL and any(layer.weight.kind == "q3k" for layer in layers.values()):
        note = f"wheel_q3k.py; the package's own: {found.differing:,} differ"
        found = compare_file(written.parts, expected_parts(with_wheel_q3k(layers, case), case, engine))
    problems = list(found.lines)
    if engine == "0.9":
        problems += check_report(written.report, layers, case, kind)
    return dataclasses.replace(
        row,
        layers=found.layers,
        size=found.size,
        differing=found.differing,
        zero_signs=found.zero_signs,
        problems=tuple(problems),
        note=note,
    )


def check_directory(job: Job, written: Written) -> Row:
    """Compare the client's directory with the one that this package makes of the same checkpoint."""
    row = Row(job.version, job.name, job.kind, DIRECTORY)
    try:
        ours = make(job.checkpoint, job.kind, job.dtype, job.recipe)
    except uqff.UqffError as exc:
        problems = () if written.refused else (f"the package refuses, the client does not: {exc}",)
        return dataclasses.replace(row, refused=written.refused or str(exc), problems=problems)
    if written.directory is None:
        problem = f"the client refuses, the package does not: {written.refused}"
        return dataclasses.replace(row, refused=written.refused, problems=(problem,))
    found = compare_directories(written.directory, ours)
    return dataclasses.replace(row, **found._asdict() | {"problems": tuple(found.problems)})


def all_cases(cases: tuple[Case, ...]) -> list[Case | DirectoryCase]:
    """Those of directories come with all cases only."""
    return [*cases, *(DIRECTORY_CASES if cases == ALL_CASES else ())]


def write_checkpoints(cases: tuple[Case, ...], folder: Path) -> None:
    """Put all checkpoints and recipes where :func:`all_jobs` has them."""
    for index, case in enumerate(all_cases(cases)):
        if isinstance(case, Case):
            case.model.write(folder / str(index))
        else:
            case.write(folder / str(index))
            if case.recipe:
                (folder / str(index) / RECIPE).write_text(case.recipe)


def all_jobs(
    versions: Iterable[str], cases: tuple[Case, ...], kinds: tuple[str, ...], folder: Path, *, few: bool = False
) -> list[Job]:
    """What the clients have to write, those in `kinds` if there are any there; `few` of it, if so asked."""
    jobs: list[Job] = []
    for index, case in enumerate(all_cases(cases)):
        checkpoint = folder / str(index)
        if isinstance(case, Case):
            about: tuple[str, str, str] = (case.name, case.model.architecture, case.dtype)
            pairs = [(version, kind) for version in versions for kind in GENERATIONS[version].kinds]
            jobs += [Job(version, *about, kind, checkpoint, case) for version, kind in pairs]
        elif VERSION in versions:
            about = (case.name, case.architecture, case.dtype)
            recipe = checkpoint / RECIPE if case.recipe else None
            jobs += [Job(VERSION, *about, kind, checkpoint, None, recipe) for kind in case.kinds]
    jobs = [job for job in jobs if not kinds or job.kind in kinds]
    if not few:
        return jobs
    chosen = few_of_each((job for job in jobs if job.case), lambda job: (job.version, job.name), 5)
    return chosen + few_of_each((job for job in jobs if not job.case), lambda job: job.checkpoints, 3)


def check_all(
    clients: dict[str, Client], cases: tuple[Case, ...], kinds: tuple[str, ...], folder: Path, *, few: bool = False
) -> Iterator[Row]:
    """The rows of every client, checkpoint and type (those in `kinds`, if there are any there).

    The client writes ahead in a thread while the package quantises. `folder` is for checkpoints and the client's files.
    """
    write_checkpoints(cases, folder)
    jobs = all_jobs(clients, cases, kinds, folder, few=few)
    with ThreadPoolExecutor(2) as pool:
        everything = pool.map(lambda job: let_client_write(clients[job.version], job), jobs)
        for job, written in zip(jobs, everything, strict=True):
            if job.case is not None:
                yield check(job.version, job.case, job.kind, written)
                if job.case.reference:
                    with reference_paths():
                        yield check(job.version, job.case, job.kind, written, by="reference")
            if job.version == VERSION:
                yield check_directory(job, written)


@contextmanager
def reference_paths() -> Iterator[None]:
    """Quantise without kernels inside."""
    before = os.environ.get("UQFF_KERNELS")
    os.environ["UQFF_KERNELS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["UQFF_KERNELS"]
        else:
            os.environ["UQFF_KERNELS"] = before


def table_of(rows: list[Row]) -> Table:
    """All rows, and a total per client."""
    table = Table(title="Quantisers: the client's stored bytes against this package's")
    for column in ("client", "model", "type", "by"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "bytes", "differing", "zero signs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remark")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before.version, before.case) != (row.version, row.case):
            table.add_section()
        table.add_row(*row.cells())
    for version, whole in dict.fromkeys((row.version, row.by == DIRECTORY) for row in rows):
        table.add_section()
        table.add_row(*total(version, [row for row in rows if (row.version, row.by == DIRECTORY) == (version, whole)]))
    return table


def total(version: str, rows: list[Row]) -> list[str]:
    """The cells of a total."""
    idle = sum(bool(row.not_run) for row in rows)
    rows = [row for row in rows if not row.not_run]
    compared = [row for row in rows if not row.refused]
    kinds = len({row.kind for row in compared})
    sums = [sum(getattr(row, name) for row in compared) for name in ("layers", "size", "differing", "zero_signs")]
    refused = f"{len(rows) - len(compared)} rows both refuse" if len(rows) > len(compared) else ""
    refused += f"{', ' if refused else ''}{idle} not run" if idle else ""
    by = DIRECTORY if rows and all(row.by == DIRECTORY for row in rows) else ""
    return [version, "all", f"{kinds} types", by, *(f"{number:,}" for number in sums), refused]
