"""Check against the real client: it must take our files for its own.

    python tools/interop.py            # make interop

For every architecture and ISQ type the client quantises a tiny checkpoint; this package reads that directory and saves
it again; the client then loads both directories and generates greedily. Required: equal bytes in every layer and in the
file, equal tokens, equal logits. With `--ours` the same is required of a directory that this package quantised from
the checkpoint's weights; only biases are taken from the client's file.

Where the client cannot run its own file, ours must fail in the same way: the table then has its reason. It is the case
of Q8_1 and Q8K (not loadable), of FP8 with biases, and, on CPUs without AVX-VNNI, of Q5_1, Q3K and Q5K. The client is
installed once, into `.venvs/` at the root of the repository.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from client import Client, ClientError, Generation
from rich.console import Console
from rich.table import Table
from tiny_models import TinyModel

import uqff

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIENT_VERSION = "0.6.0"
UQFF_VERSION = (0, 1, 3)
ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1"),
    *("q2k", "q3k", "q4k", "q5k", "q6k", "q8k"),
    *("hqq4", "hqq8", "fp8"),
    *("afq2", "afq3", "afq4", "afq6", "afq8"),
)
MIXED = "mixed"
"""Not an ISQ type: q8_0 but for decoder layer 0, which stays unquantised."""
MODELS = {
    "llama": TinyModel("llama", intermediate_size=256, layers=2, std=0.08, seed=21),
    "qwen2": TinyModel("qwen2", intermediate_size=256, layers=1, std=0.08, tied=True, seed=22),
}
"""In-dims are multiples of 256, so that no K quant falls back; qwen2 has biases, and a tied lm_head."""


KNOWN = {"q3k": "the 0.6.0 wheel never takes sub-block 0 for the super-scale when its scale is negative"}
"""Kinds whose `--ours` bytes may differ from the client's, and why; shown, not counted."""
KNOWN_SHARE = 0.01
"""The share of a file's bytes up to which a difference passes for the known one; that of Q3K is 0.4 %."""


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


def install_client(version: str) -> Path:
    """The interpreter of `.venvs/mistralrs-<version>`, which is made from this interpreter and PyPI if absent.

    Raises click.ClickException with pip's output if that fails.
    """
    folder = ROOT / ".venvs" / f"mistralrs-{version}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", f"mistralrs=={version}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    (folder / "ready").touch()
    return python


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


def quantize_ours(model: TinyModel, kind: str, client_layers: Mapping[Any, uqff.Layer]) -> dict[Any, uqff.Layer]:
    """Quantise the checkpoint's weights by this package, under the keys and with the biases of the client's file."""
    import torch

    quantize = getattr(uqff, "quantize", None)
    if quantize is None:
        raise click.ClickException("this package has no uqff.quantize yet")
    tensors, names = model.tensors(), model.layer_names()
    return {
        key: uqff.Layer(quantize(torch.from_numpy(tensors[f"{names[int(key)]}.weight"]), kind), layer.bias)
        for key, layer in client_layers.items()
    }


def run_client(client: Client, files: list[Path], architecture: str) -> Outcome:
    """Let the client load `files`, all shards of a model in their directory, and generate."""
    names = [path.name for path in files]
    try:
        return Outcome(client.generate(files[0].parent, names, architecture=architecture, dtype="F32"))
    except ClientError as exc:
        return Outcome(None, exc.reason, exc.loaded)


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table; `file_equal` is None where the files are meant to differ (another number of shards)."""

    architecture: str
    kind: str
    made: str
    layers: list[LayerComparison]
    file_equal: bool | None
    theirs: Outcome
    ours: Outcome

    @property
    def equal(self) -> bool:
        """No byte, token or logit differs."""
        return (
            self.file_equal is not False
            and not any(layer.differing for layer in self.layers)
            and self.theirs == self.ours
        )

    @property
    def known(self) -> str | None:
        """Why this package's quantiser may differ here from the client; None if the difference is not a known one."""
        differing, size = sum(layer.differing for layer in self.layers), sum(layer.size for layer in self.layers)
        alike = (self.theirs.generation is None, self.theirs.loaded) == (self.ours.generation is None, self.ours.loaded)
        if self.made == "quantised" and alike and differing <= KNOWN_SHARE * size:
            return KNOWN.get(self.kind)
        return None

    def row(self) -> list[str]:
        """The cells of the table."""
        differing = sum(layer.differing for layer in self.layers)
        size = sum(layer.size for layer in self.layers)
        if self.theirs != self.ours:
            tokens = f"[red]{self.theirs.difference(self.ours)}[/red]"
        elif self.theirs.generation is None:
            tokens = f"[yellow]neither: {self.theirs}[/yellow]"
        else:
            tokens = f"[green]{self.theirs} and logits equal[/green]"
        file = {True: "[green]equal[/green]", False: "[red]differs[/red]", None: "sharded"}[self.file_equal]
        bytes_cell = f"[red]{differing:,} of {size:,}[/red]" if differing else f"0 of {size:,}"
        return [self.architecture, self.kind, self.made, str(len(self.layers)), bytes_cell, file, tokens]


def check(client: Client, architecture: str, kind: str, model: Path, scratch: Path, *, ours: bool) -> list[Result]:
    """The rows of one kind: the client's file, ours made from it, and what the client makes of both.

    `model` is the checkpoint's folder, `scratch` an empty one. `ours` adds the row of this package's quantiser.
    """
    client_dir = scratch / "client"
    written = client.write(
        model,
        client_dir / "0.uqff",
        architecture=architecture,
        dtype="F32",
        isq="q8_0" if kind == MIXED else kind,
        topology=write_topology(scratch, MODELS[architecture].layers) if kind == MIXED else None,
    )
    theirs = run_client(client, [written], architecture)
    results = []
    with uqff.open(client_dir) as file:
        layers = dict(file.items())
        made: dict[str, tuple[dict[Any, uqff.Layer], dict[str, Any]]] = {"re-saved": (layers, {})}
        if kind == MIXED:
            made["re-saved, sharded"] = (layers, {"shard_bytes": written.stat().st_size // 3})
        elif ours:
            made["quantised"] = (quantize_ours(MODELS[architecture], kind, layers), {})
        for name, (our_layers, options) in made.items():
            files = write_ours(client_dir, scratch / name, our_layers, **options)
            with uqff.open(scratch / name) as our_file:
                comparisons = compare_layers(client_dir, our_file)
            equal = written.read_bytes() == files[0].read_bytes() if len(files) == 1 else None
            outcome = run_client(client, files, architecture)
            results.append(Result(architecture, kind, name, comparisons, equal, theirs, outcome))
    return results


def write_topology(folder: Path, layers: int) -> Path:
    """The topology file of `MIXED`; it must name every layer (mistral.rs v0.6.0, `device_map.rs`, panics otherwise)."""
    path = folder / "topology.yml"
    path.write_text("0:\n  isq:\n" + "".join(f"{i}:\n  isq: q8_0\n" for i in range(1, layers)))
    return path


@click.command()
@click.option(
    "--client", "python", type=click.Path(path_type=Path), help="Interpreter with mistralrs; else installs it."
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS, MIXED]), help="Only these ISQ types.")
@click.option("--architecture", "architectures", multiple=True, type=click.Choice([*MODELS]), help="Only these models.")
@click.option("--ours", is_flag=True, help="Check this package's quantisers too.")
def main(python: Path | None, kinds: tuple[str, ...], architectures: tuple[str, ...], ours: bool) -> None:
    """Check this package's files against the real client; exit 1 on any difference."""
    console = Console()
    start = time.monotonic()
    client = Client(python or install_client(CLIENT_VERSION))
    about = client.about()
    table = Table("model", "kind", "ours is", "layers", "bytes differing", "file", "client's generation")
    table.title = f"mistralrs {about['version']}, {about['system']} {about['machine']}"
    results: list[Result] = []
    for architecture in architectures or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            MODELS[architecture].write(model)
            for kind in kinds or (*KINDS, MIXED):
                scratch = Path(folder) / kind
                scratch.mkdir()
                results += check(client, architecture, kind, model, scratch, ours=ours)
    for result in results:
        table.add_row(*result.row())
    console.print(table)
    failed = report(results, console)
    console.print(f"{time.monotonic() - start:.0f} s")
    sys.exit(1 if failed else 0)


def report(results: list[Result], console: Console) -> bool:
    """Print what differs, layer by layer, and the counts; return whether anything differs that is not in `KNOWN`."""
    failed = known = 0
    for result in (result for result in results if not result.equal):
        where = f"{result.architecture} {result.kind} {result.made}"
        if result.known:
            known += 1
            console.print(f"{where}: known, {result.known}")
        else:
            failed += 1
        for layer in (layer for layer in result.layers if layer.differing):
            console.print(
                f"{where}: layer {layer.key} ({layer.kind}): {layer.differing:,} of {layer.size:,} bytes differ, "
                f"first at {layer.first}"
            )
    idle = sum(result.theirs.generation is None for result in results)
    counts = f"{failed} differ, {known} differ as known, {idle} that the client itself cannot run here"
    console.print(f"{len(results)} checked: {counts}")
    return failed > 0


if __name__ == "__main__":
    main()
