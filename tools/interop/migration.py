"""What the clients make of migrated models, for `tools/interop`.

Up: a pre-1.0 directory, written by the 0.6.0 client (or by this package, where that client has no such type, or cannot
write it on this CPU), is migrated, and

* migrated back it must be the same directory, byte for byte;
* its layers must be those that the 0.9.5 client stores of the same weights, entry by entry, but for the head and the
  embedding, to which that client gives another type;
* the 0.9.5 client must run it exactly, to the last bit of a logprob, as it runs its own file of the same weights, once
  that has the embedding dense and the head unpromoted, as the older file has;
* the 0.9.5 client must generate from it what the 0.6.0 client generates from the original.

Down: the 0.9.5 client's own file is migrated, the 0.6.0 client must run it alike, and migrated back it must have the
same entries.

Between the clients, tokens must be equal up to a place where the two best are so close that the difference of the
clients decides (`TOLERANCE` says how much they differ, and why).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table
from safetensors.torch import load_file, save_file

import uqff
from tools.interop.client import Client, ClientError, Generation, NotOnThisCPU
from tools.interop.few import few_of_each
from tools.interop.reading import MIXED, write_topology
from tools.tiny import architectures as tiny_architectures
from tools.tiny.models import TinyModel
from uqff.checkpoints.model import ModelDirectory
from uqff.migration import migrate, plan_migration
from uqff.quantization.run import quantize_model

OLD, NEW = "0.6.0", "0.9.5"
OURS = ("f8q8", "mxfp4")
"""Types that no pre-1.0 client on PyPI writes: this package quantises them."""

TOLERANCE = {"afq": 1e-3, "fp8": 1e-3}
"""Largest difference of a logprob between the clients. AFQ and FP8 are computed in float32 by both."""
ROUNDED = 2e-2
"""That of all other types: 0.6.0 multiplies plain matrices (which HQQ and unquantised layers are made) in F16 on a CPU,
and the clients have different kernels for ggml types, whose inputs they quantise.
"""


class Checkpoint(Protocol):
    """What is quantised."""

    def write(self, folder: Path) -> None:
        """Write it."""


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A checkpoint of `tiny_architectures`."""

    name: str

    def write(self, folder: Path) -> None:
        """Write it."""
        tiny_architectures.write(self.name, folder)


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint, how the clients call it and load it, and the types it is quantised to.

    `plain`: experts of those types go dequantised, because 1.2 has no stacks of them.
    """

    name: str
    architecture: str
    model: Checkpoint
    kinds: tuple[str, ...]
    dtype: str = "F32"
    tied: bool = False
    plain: tuple[str, ...] = ()


CASES = (
    Case(
        "llama",
        "llama",
        TinyModel("llama", intermediate_size=256, layers=2, seed=61),
        ("q4_0", "q5_0", "q8_0", "q4k", "q6k", "hqq4", "hqq8", "fp8", "afq2", "afq4", *OURS, MIXED),
    ),
    Case(
        "qwen2 tied",
        "qwen2",
        TinyModel("qwen2", intermediate_size=256, tied=True, seed=62),
        ("q8_0", "q4k", "fp8", "hqq4", "afq4", *OURS),
        tied=True,
    ),
    Case(
        "qwen2 f16",
        "qwen2",
        TinyModel("qwen2", intermediate_size=256, weight_dtype="F16", seed=63),
        ("afq4", "q8_0", "fp8"),
        dtype="F16",
    ),
    Case(
        "qwen2 bf16",
        "qwen2",
        TinyModel("qwen2", intermediate_size=256, weight_dtype="BF16", seed=64),
        ("q4_0", "mxfp4", "afq8"),
        dtype="BF16",
    ),
    Case("qwen3-moe", "Qwen3Moe", Tiny("Qwen3Moe"), ("q4_0", "q8_0", "hqq8", "fp8"), plain=("hqq8", "fp8")),
    Case("mixtral", "mixtral", Tiny("Mixtral"), ("q8_0",)),
    Case("phi3", "phi3", Tiny("Phi3"), ("q8_0", "fp8")),
    Case("gemma2", "gemma2", Tiny("Gemma2"), ("q8_0", "fp8"), tied=True),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a client made of a directory: tokens with their logprobs, or the reason why there are none."""

    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    reason: str = ""
    not_run: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """One row: what was compared, and what is wrong with it."""

    case: str
    kind: str
    way: str
    layers: int
    entries: str
    own: str
    other: str
    problems: tuple[str, ...]
    not_run: bool = False


def run(client: Client, version: str, case: Case, folder: Path, files: list[str]) -> Outcome:
    """Let a client load a directory and generate."""
    try:
        made = client.generate(folder, files, architecture=case.architecture, dtype=case.dtype, temperature=1.0)
    except ClientError as exc:
        return Outcome(reason=exc.reason, not_run=isinstance(exc, NotOnThisCPU))
    return _outcome(made, math.log(10) if version == OLD else 1.0)


def _outcome(made: Generation, base: float) -> Outcome:
    margins = tuple(a - b for a, b in zip(made.logits, made.seconds, strict=True))
    return Outcome(tuple(made.tokens), tuple(base * value for value in made.logits), margins)


def compare_exactly(a: Outcome, b: Outcome) -> tuple[str, list[str]]:
    """A cell and what is wrong: both must have the same tokens and logprobs, or fail alike."""
    if not a.tokens and a.reason == b.reason:
        return f"neither: {a.reason}", []
    if a.tokens and (a.tokens, a.logprobs) == (b.tokens, b.logprobs):
        return f"{len(a.tokens)} tokens, logprobs equal", []
    return "differs", [f"own file: {a.reason or a.tokens}, migrated: {b.reason or b.tokens}"]


def compare_nearly(old: Outcome, new: Outcome, tolerance: float) -> tuple[str, list[str]]:
    """A cell and what is wrong: logprobs may differ by the tolerance, and tokens where that decides."""
    if not old.tokens or not new.tokens:
        return "differs", [f"{old.reason or old.tokens}, and {new.reason or new.tokens}"]
    # 0.6.0 gives one token more than it is asked for.
    count = min(len(old.tokens), len(new.tokens))
    same = next((i for i in range(count) if old.tokens[i] != new.tokens[i]), count)
    largest = max((abs(a - b) for a, b in zip(old.logprobs[:same], new.logprobs[:same], strict=True)), default=0.0)
    problems = []
    if largest > tolerance:
        problems.append(f"logprobs differ by {largest:.2g}, more than {tolerance:g}")
    if same < count and new.margins[same] > 2 * tolerance:
        problems.append(f"token {same} differs, by a margin of {new.margins[same]:.2g}")
    tie = f", then a tie within {new.margins[same]:.1g}" if same < count else ""
    return f"{same} tokens{tie}, logprobs within {largest:.1g}", problems


def tolerance_of(case: Case, kind: str) -> float:
    """How far the clients may be apart."""
    exact = [value for name, value in TOLERANCE.items() if kind.startswith(name) and case.dtype == "F32"]
    return exact[0] if exact else ROUNDED


Entries = dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]


def read_entries(folder: Path) -> Entries:
    """All entries of a 1.x model, by key and suffix."""
    with uqff.open(folder) as file:
        return {
            key: {suffix: (entry.dtype, entry.shape, bytes(entry.data)) for suffix, entry in file.entries(key).items()}
            for key in file
        }


def write_old(client: Client, case: Case, kind: str, model: Path, folder: Path) -> None:
    """A pre-1.0 directory: the client's, or ours, also where the client cannot write it on this CPU.

    Raises NotOnThisCPU for mixed types that it cannot write.
    """
    dtype = case.dtype.lower()
    if kind in OURS:
        quantize_model(model, folder, [kind], version="0.2", engine="0.8", dtype=dtype, engine_biases=True)
        return
    try:
        _write(client, case, kind, model, folder)
    except NotOnThisCPU:
        if kind == MIXED:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        quantize_model(model, folder, [kind], version="0.2", engine="0.6", dtype=dtype, engine_biases=True)


def _write(client: Client, case: Case, kind: str, model: Path, folder: Path) -> None:
    layers = case.model.layers if isinstance(case.model, TinyModel) else tiny_architectures.LAYERS
    client.write(
        model,
        folder / f"{kind}.uqff",
        architecture=case.architecture,
        dtype=case.dtype,
        isq="q8_0" if kind == MIXED else kind,
        topology=write_topology(model.parent, layers) if kind == MIXED else None,
    )


def with_dense_embedding(own: Path, migrated: Path, folder: Path) -> None:
    """The 0.9.5 client's own directory, with the embedding dense and the head of the migrated one."""
    shutil.copytree(migrated, folder, ignore=shutil.ignore_patterns("*.uqff", "uqff_report.json"))
    with uqff.open(own) as file, uqff.open(migrated) as other:
        layers = {key: layer for key, layer in file.items() if key not in ("model.embed_tokens", "lm_head")}
        uqff.save(layers | {"lm_head": other["lm_head"]}, folder / other.paths[0].name, version=(1, 2, 0))
        embedding = {"model.embed_tokens.weight": other.residual["model.embed_tokens.weight"]}
        save_file({name: file.residual[name] for name in file.residual} | embedding, folder / "residual.safetensors")


def check_up(clients: dict[str, Client], case: Case, kind: str, model: Path, scratch: Path) -> Result:
    """Pre-1.0 to 1.2."""
    old, new, files = scratch / "old", scratch / "new", [f"{kind}-0.uqff"]
    way = f"{'ours' if kind in OURS else OLD} -> 1.2"
    try:
        write_old(clients[OLD], case, kind, model, old)
    except NotOnThisCPU as exc:
        return Result(case.name, kind, way, 0, "-", "-", exc.reason, (), not_run=True)
    fix = "load" if has_odd_biases(old, "1.2") else None
    lossless = fix is None and kind not in case.plain
    migrate(old, new, fix_biases=fix, plain_experts=kind in case.plain)
    problems = check_both_ways(old, scratch) if kind not in case.plain else []
    migrated, entries, own = read_entries(new), "-", scratch / "own"
    outcome = run(clients[NEW], NEW, case, new, files)
    comparable = kind not in (*case.plain, MIXED)
    if comparable:
        _write(clients[NEW], case, kind, model, own)
        entries, odd = compare_entries(migrated, read_entries(own), but_biases=fix is not None)
        problems += [f"{key}: entries are not the client's" for key in odd]
    if comparable and lossless:
        with_dense_embedding(own, new, scratch / "reference")
        cell, wrong = compare_exactly(run(clients[NEW], NEW, case, scratch / "reference", files), outcome)
    else:
        plain = run(clients[NEW], NEW, case, write_plain(case, model, scratch), [])
        cell, wrong = compare_nearly(plain, outcome, ROUNDED)
        cell = f"dequantised: {cell}"
    problems += wrong
    other, not_run = "-", False
    if kind not in OURS:
        if case.tied:
            # The engine gives the embedding the codes of the head unless it is told that they are two.
            migrate(old, scratch / "untied", untie=True, fix_biases=fix)
            outcome = run(clients[NEW], NEW, case, scratch / "untied", files)
        before = run(clients[OLD], OLD, case, old, files)
        not_run = before.not_run
        if not_run or any(reason in before.reason for reason in UNABLE):
            other = f"{OLD} cannot: {before.reason}"
        else:
            other, wrong = compare_nearly(before, outcome, tolerance_of(case, kind))
            problems += wrong
    return Result(case.name, kind, way, len(migrated), entries, cell, other, tuple(problems), not_run)


UNABLE = ("unsupported dtype BF16 for op matmul", "rhs: F8E4M3")
"""Why the 0.6.0 client cannot run some of its own files: no BF16 on this CPU, biases of FP8 layers."""


def has_odd_biases(folder: Path, to: str) -> bool:
    """Whether a model has biases that the engine cannot add."""
    with ModelDirectory(folder) as directory:
        return any("--fix-biases" in warning for warning in plan_migration(directory, to).warnings)


def check_both_ways(old: Path, scratch: Path) -> list[str]:
    """Migrated there and back, a pre-1.0 directory must be what it was."""
    migrate(old, scratch / "there")
    migrate(scratch / "there", scratch / "back", version="0.2")
    odd = [path.name for path in old.iterdir() if (scratch / "back" / path.name).read_bytes() != path.read_bytes()]
    return [f"{name} is not the same after both ways" for name in odd]


def compare_entries(ours: Entries, theirs: Entries, *, but_biases: bool) -> tuple[str, list[str]]:
    """A cell, and the layers whose entries differ; head and embedding are not compared."""
    keys = sorted((ours.keys() | theirs.keys()) - {"lm_head", "model.embed_tokens"})

    def stored(model: Entries, key: str) -> dict[str, Any]:
        return {suffix: entry for suffix, entry in model.get(key, {}).items() if suffix != "bias" or not but_biases}

    odd = [key for key in keys if stored(ours, key) != stored(theirs, key)]
    return f"{len(keys) - len(odd)} of {len(keys)} equal", odd


def write_plain(case: Case, model: Path, scratch: Path) -> Path:
    """A plain checkpoint of the migrated model's dequantised weights."""
    folder = scratch / "plain"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    dtype = next(iter(tensors.values())).dtype
    with uqff.open(scratch / "new") as file:
        for key, (weight, bias) in file.items():
            name = "model.embed_tokens" if case.tied and key == "lm_head" else key
            if len(weight.shape) == 3:
                tensors |= dict(zip(_expert_names(key, weight.shape[0]), weight.dequantize(dtype), strict=True))
            else:
                tensors[f"{name}.weight"] = weight.dequantize(dtype)
            if bias is not None:
                tensors[f"{name}.bias"] = bias.to(dtype)
        save_file(tensors, folder / "model.safetensors")
    return folder


def _expert_names(key: str, count: int) -> list[str]:
    block, _, projection = key.rpartition(".experts.")
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    part = names[projection] if block.endswith("block_sparse_moe") else projection
    return [f"{block}.experts.{expert}.{part}.weight" for expert in range(count)]


def check_down(clients: dict[str, Client], case: Case, kind: str, model: Path, scratch: Path) -> Result:
    """1.2 to pre-1.0."""
    own, files = scratch / "own", [f"{kind}-0.uqff"]
    migrate(own, scratch / "lowered", version="0.2")
    migrate(scratch / "lowered", scratch / "raised")
    entries, odd = compare_all_entries(read_entries(own), read_entries(scratch / "raised"))
    problems = [f"{key}: entries are not the same after both ways" for key in odd]
    runnable = {OLD: scratch / "lowered", NEW: own}
    for version, to in ((OLD, "0.2"), (NEW, "1.2")):
        if has_odd_biases(own, to):
            runnable[version] = scratch / f"for-{version}"
            migrate(own, runnable[version], version=to, fix_biases="load")
    before, after = (run(clients[version], version, case, runnable[version], files) for version in (OLD, NEW))
    if before.not_run or any(reason in before.reason for reason in UNABLE):
        cell = f"{OLD} cannot: {before.reason}"
    else:
        cell, wrong = compare_nearly(before, after, tolerance_of(case, kind))
        problems += wrong
    return Result(
        case.name, kind, f"1.2 -> {OLD}", len(read_entries(own)), entries, "-", cell, tuple(problems), before.not_run
    )


def compare_all_entries(ours: Entries, theirs: Entries) -> tuple[str, list[str]]:
    """A cell, and the layers whose entries differ."""
    keys = sorted(ours.keys() | theirs.keys())
    odd = [key for key in keys if ours.get(key) != theirs.get(key)]
    return f"{len(keys) - len(odd)} of {len(keys)} equal", odd


DOWN = ("q8_0", "q4k", "afq4", "fp8", "hqq4")
"""Types that are migrated down, too."""


def all_jobs(kinds: Sequence[str] = (), *, few: bool = False) -> list[tuple[Case, str]]:
    """Cases and kinds, those in `kinds` if there are any there; `few` of them, if so asked."""
    jobs = [(case, kind) for case in CASES for kind in case.kinds if not kinds or kind in kinds]
    return few_of_each(jobs, lambda job: job[0].name, 2) if few else jobs


def check_all(clients: dict[str, Client], jobs: Iterable[tuple[Case, str]], folder: Path) -> Iterator[Result]:
    """The rows of the jobs. `folder` is for checkpoints and files."""
    for case, kind in jobs:
        model, scratch = folder / case.name / "model", folder / case.name / kind
        if not model.exists():
            case.model.write(model)
        scratch.mkdir()
        yield check_up(clients, case, kind, model, scratch)
        if kind in DOWN and kind not in case.plain:
            yield check_down(clients, case, kind, model, scratch)


def table_of(results: list[Result]) -> Table:
    """All rows."""
    table = Table(title="Migration: the clients run migrated models as they run their own")
    for column in ("model", "kind", "way", "layers", "entries"):
        table.add_column(column, no_wrap=True)
    table.add_column(f"in {NEW}, against its own")
    table.add_column(f"{OLD} against {NEW}")
    for result in results:
        colour = "red" if result.problems else "green"
        cells = (result.entries, result.own, result.other)
        row = [f"[{colour}]{cell}[/{colour}]" if cell != "-" else cell for cell in cells]
        table.add_row(result.case, result.kind, result.way, str(result.layers), *row)
    return table
