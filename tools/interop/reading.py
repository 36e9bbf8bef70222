"""What the client makes of this package's files, for `tools/interop`: it must take them for its own.

For every architecture and ISQ type the 0.6.0 client quantises a tiny checkpoint. This package writes that directory
twice, from the layers it read in it and from the checkpoint's weights, quantised by itself; the client then loads all
three and generates greedily. Required: equal bytes in every layer and in the file, equal tokens, equal logits.

Where the client cannot run its own file, ours must fail in the same way: the table then has its reason. It is the case
of Q8_1 and Q8K (not loadable), and of FP8 with biases. What it cannot write or run on this CPU is counted as not run,
and proven from golden files (`golden`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import uqff
from tools.interop.cases import Case
from tools.interop.client import Client, ClientError, Generation, NotOnThisCPU
from tools.interop.few import few_of_each
from tools.interop.quantisers import GENERATIONS, WHEEL, quantise, with_wheel_q3k
from tools.tiny.models import TinyModel

CLIENT_VERSION = WHEEL
UQFF_VERSION = (0, 1, 3)
KINDS = GENERATIONS[CLIENT_VERSION].kinds
MIXED = "mixed"
"""Not an ISQ type: q8_0 but for decoder layer 0, which stays unquantised."""
MODELS = {
    "llama": TinyModel("llama", intermediate_size=256, layers=2, std=0.08, seed=21),
    "qwen2": TinyModel("qwen2", intermediate_size=256, layers=1, std=0.08, tied=True, seed=22),
}
"""In-dims are multiples of 256, so that no K quant falls back; qwen2 has biases, and a tied lm_head."""

RE_SAVED, QUANTISED = "re-saved", "quantised"


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """One layer in two files. `first` is the offset of the first differing byte in the blob, None if there is none."""

    key: str
    kind: str
    size: int
    differing: int
    first: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the client made of a directory: a generation, or the reason why there is none."""

    generation: Generation | None
    reason: str = ""
    loaded: bool = True
    not_run: bool = False

    def difference(self, ours: Outcome) -> str:
        """Where the client's outcome for `ours` first leaves this one, that for its own directory."""
        if self.generation is None or ours.generation is None:
            return f"client's: {self}; ours: {ours}"
        pairs = zip(self.generation.tokens, ours.generation.tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if same is not None or len(self.generation.tokens) != len(ours.generation.tokens):
            return f"tokens differ after {same if same is not None else 'the end of the shorter'}"
        largest = max(abs(a - b) for a, b in zip(self.generation.logits, ours.generation.logits, strict=True))
        return f"tokens equal, logits differ by up to {largest:.2g}"

    def __str__(self) -> str:
        if self.generation is not None:
            return f"{len(self.generation.tokens)} tokens"
        return f"{'loaded, then ' if self.loaded else ''}{self.reason}"


def compare_layers(client_dir: Path, our_layers: Mapping[Any, uqff.Layer]) -> list[LayerComparison]:
    """Compare `our_layers` with those of the client's directory, blob by blob, each as this package serialises it.

    A layer that only one side has counts as differing in its whole size.
    """
    comparisons = []
    with uqff.open(client_dir) as file:
        for key in sorted({*file, *our_layers}, key=str):
            theirs = uqff.serialize(file[key], version=UQFF_VERSION) if key in file else b""
            ours = uqff.serialize(our_layers[key], version=UQFF_VERSION) if key in our_layers else b""
            weight = (file[key] if key in file else our_layers[key]).weight
            places = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b] if theirs != ours else []
            differing = len(places) + abs(len(theirs) - len(ours))
            first = places[0] if places else min(len(theirs), len(ours)) if differing else None
            comparisons.append(LayerComparison(str(key), str(weight.kind), len(theirs), differing, first))
    return comparisons


def write_ours(client_dir: Path, our_dir: Path, layers: Mapping[Any, uqff.Layer], **options: Any) -> list[Path]:
    """Write `layers` as a model directory of ours, with the client's residual, configuration and tokenizer.

    Returns the `.uqff` files. `options` go to `uqff.save`.
    """
    our_dir.mkdir()
    for path in client_dir.iterdir():
        if path.suffix != ".uqff":
            shutil.copyfile(path, our_dir / path.name)
    return uqff.save(layers, our_dir / "0-0.uqff", version=UQFF_VERSION, **options)


Layers = Mapping[Any, uqff.Layer]


def quantise_ours(architecture: str, kind: str, keys: list[Any]) -> tuple[Layers, Layers]:
    """The checkpoint's layers under the file's `keys`: quantised by this package, and with the wheel's Q3K."""
    case = Case(architecture, MODELS[architecture], "F32")
    layers = quantise(case, kind, "0.6")
    wheel = with_wheel_q3k(layers, case)
    names = {key: case.model.layer_names()[int(key)] for key in keys}
    return {key: layers[name] for key, name in names.items()}, {key: wheel[name] for key, name in names.items()}


def run_client(client: Client, files: list[Path], architecture: str) -> Outcome:
    """Let the client load `files`, all shards of a model in their directory, and generate."""
    names = [path.name for path in files]
    try:
        return Outcome(client.generate(files[0].parent, names, architecture=architecture, dtype="F32"))
    except ClientError as exc:
        return Outcome(None, exc.reason, exc.loaded, isinstance(exc, NotOnThisCPU))


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table; `file_equal` is None where the files are meant to differ (another number of shards).

    `wheel_equal`: our layers are the client's once their Q3K is that of its wheel, see `wheel_q3k`.
    """

    architecture: str
    kind: str
    made: str
    layers: list[LayerComparison]
    file_equal: bool | None
    theirs: Outcome
    ours: Outcome
    wheel_equal: bool = False

    @property
    def equal(self) -> bool:
        """No byte, token or logit differs."""
        return (
            self.file_equal is not False
            and not any(layer.differing for layer in self.layers)
            and self.theirs == self.ours
        )

    @property
    def not_run(self) -> bool:
        """The client could not run its own file on this CPU; where there are layers, it wrote them."""
        return self.theirs.not_run

    @property
    def known(self) -> bool:
        """It differs by the defect of the wheel's Q3K and nothing else, and the client runs one file as the other."""
        alike = (self.theirs.generation is None, self.theirs.loaded) == (self.ours.generation is None, self.ours.loaded)
        return self.made == QUANTISED and self.kind == "q3k" and not self.equal and self.wheel_equal and alike

    def row(self) -> list[str]:
        """The cells of the table."""
        differing = sum(layer.differing for layer in self.layers)
        size = sum(layer.size for layer in self.layers)
        file = {True: "[green]equal[/green]", False: "[red]differs[/red]", None: "sharded"}[self.file_equal]
        if self.not_run and not self.layers:
            return [self.architecture, self.kind, self.made, "-", "-", "-", f"[yellow]{self.theirs}[/yellow]"]
        if self.known:
            file, tokens = "the wheel's Q3K", f"{self.theirs} and {self.ours}"
        elif self.theirs != self.ours:
            tokens = f"[red]{self.theirs.difference(self.ours)}[/red]"
        elif self.theirs.generation is None:
            tokens = f"[yellow]neither: {self.theirs}[/yellow]"
        else:
            tokens = f"[green]{self.theirs} and logits equal[/green]"
        bytes_cell = f"[red]{differing:,} of {size:,}[/red]" if differing else f"0 of {size:,}"
        return [self.architecture, self.kind, self.made, str(len(self.layers)), bytes_cell, file, tokens]


def check(client: Client, architecture: str, kind: str, model: Path, scratch: Path) -> list[Result]:
    """The rows of one kind: the client's file, ours made from it or the weights, and what the client makes of each.

    `model` is the checkpoint's folder, `scratch` an empty one.
    """
    client_dir = scratch / "client"
    try:
        written = client.write(
            model,
            client_dir / "0.uqff",
            architecture=architecture,
            dtype="F32",
            isq="q8_0" if kind == MIXED else kind,
            topology=write_topology(scratch, MODELS[architecture].layers) if kind == MIXED else None,
        )
    except NotOnThisCPU as exc:
        outcome = Outcome(None, exc.reason, loaded=False, not_run=True)
        return [
            Result(architecture, kind, name, [], None, outcome, outcome)
            for name in (RE_SAVED, f"{RE_SAVED}, sharded" if kind == MIXED else QUANTISED)
        ]
    theirs = run_client(client, [written], architecture)
    results = []
    with uqff.open(client_dir) as file:
        layers = dict(file.items())
        made: dict[str, tuple[Mapping[Any, uqff.Layer], dict[str, Any]]] = {RE_SAVED: (layers, {})}
        wheel_equal = False
        if kind == MIXED:
            made[f"{RE_SAVED}, sharded"] = (layers, {"shard_bytes": written.stat().st_size // 3})
        else:
            ours, wheel = quantise_ours(architecture, kind, list(layers))
            made[QUANTISED] = (ours, {})
            wheel_equal = not any(layer.differing for layer in compare_layers(client_dir, wheel))
        for name, (our_layers, options) in made.items():
            files = write_ours(client_dir, scratch / name, our_layers, **options)
            with uqff.open(scratch / name) as our_file:
                comparisons = compare_layers(client_dir, our_file)
            equal = written.read_bytes() == files[0].read_bytes() if len(files) == 1 else None
            outcome = run_client(client, files, architecture)
            results.append(Result(architecture, kind, name, comparisons, equal, theirs, outcome, wheel_equal))
    return results


def write_topology(folder: Path, layers: int) -> Path:
    """The topology file of `MIXED`; it must name every layer (mistral.rs v0.6.0, `device_map.rs`, panics otherwise)."""
    path = folder / "topology.yml"
    path.write_text("0:\n  isq:\n" + "".join(f"{i}:\n  isq: q8_0\n" for i in range(1, layers)))
    return path


def all_jobs(kinds: Sequence[str] = (), *, few: bool = False) -> list[tuple[str, str]]:
    """Architectures and kinds, those in `kinds` if there are any there; `few` of them, if so asked."""
    jobs = [(name, kind) for name in MODELS for kind in (*KINDS, MIXED) if not kinds or kind in kinds]
    return few_of_each(jobs, lambda job: job[0], 2) if few else jobs


def check_all(client: Client, jobs: Iterable[tuple[str, str]], folder: Path) -> Iterator[Result]:
    """The rows of the jobs. `folder` is for checkpoints and files."""
    for architecture, kind in jobs:
        model, scratch = folder / architecture / "model", folder / architecture / kind
        if not model.exists():
            MODELS[architecture].write(model)
        scratch.mkdir()
        yield from check(client, architecture, kind, model, scratch)


def table_of(results: list[Result]) -> Table:
    """All rows."""
    table = Table(title="Files: the client runs this package's as its own")
    for column in ("model", "kind", "ours is", "layers", "bytes differing", "file"):
        table.add_column(column, no_wrap=True)
    table.add_column("client's generation")
    for result in results:
        table.add_row(*result.row())
    return table


def differences(results: list[Result]) -> list[str]:
    """A line for each layer that differs, those of the wheel's Q3K excepted."""
    return [
        f"{result.architecture} {result.kind} {result.made}: layer {layer.key} ({layer.kind}): "
        f"{layer.differing:,} of {layer.size:,} bytes differ, first at {layer.first}"
        for result in results
        if not result.known
        for layer in result.layers
        if layer.differing
    ]
