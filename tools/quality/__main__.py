"""How good the types are, and the mixes of `uqff plan`: `make quality`.

    python -m tools.quality --models small --types q4k,q5k --windows 8

Two models: a small Llama that this trains the first time (25 minutes on two cores that had other work, too), and
SmolLM2-135M. Both are kept in the user's cache directory, outside of the tree, and so are the tables, as JSON. Each is
quantised to every type, as the engine does it; with `--effort best`, without and with importance; and with `--effort
calibrated`; and compared with itself in float32 on sources of Python's standard library that it was neither trained nor
calibrated on. What is in the tables already, of the same settings, is not measured again: it may be run in pieces, and
of many cores each row needs a few only: `--jobs 8`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import uqff
from tools.quality import corpus, smollm2, train
from tools.quality.row import EFFORTS, row_of
from uqff.planning.assign import within_size
from uqff.planning.candidates import default_kinds
from uqff.planning.picture import write_frontier
from uqff.planning.topology import topology
from uqff.quantization.recipe import parse_recipe
from uqff.simd.threads import num_threads

TARGETS = (3.5, 4.5, 5.5)
CALIBRATED = 16
"""How many times as many windows as measured with are calibrated with."""
PLANNED = 8
"""Windows that a mix is planned with."""
FEW_TYPES = "q4_0,q4_1,q5_0,q5_1,mxfp4,afq2,afq3,afq4,hqq4"
"""Of SmolLM2, whose rows K quants do not fit, those of 2 to 5 bits."""
REACH = 0.8
"""Of the best uniform type's divergence, what a mix of no more bytes is to stay below."""


def cache() -> Path:
    """Where models, texts and tables are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "uqff" / "quality" / f"python-{corpus.name()}"


def machine() -> str:
    """What this runs on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return f"{num_threads()} threads of {model or platform.machine()}"


def model_of(name: str, folder: Path) -> Path:
    """The checkpoint of that name; made if it is not there."""
    path = folder / name
    if not path.is_dir():
        click.echo(f"making {path}")
        (train.train if name == "small" else smollm2.write)(path)
    return path


def known_of(path: Path, kept: Path, windows: int, calibrating: dict[str, Any]) -> dict[str, Path]:
    """Files of importance and Hessians of so many windows; kept, too, as all types share them."""
    known = {"imatrix": kept.with_suffix(".gguf"), "hessian": kept.with_suffix(".hessian")}
    if not all(each.exists() for each in known.values()):
        started = time.monotonic()
        uqff.calibrate(path, out=known["imatrix"], hessian=known["hessian"], windows=windows, **calibrating)
        click.echo(f"calibrated in {time.monotonic() - started:.0f} s")
    return known


def rows_of(
    path: Path, kinds: list[str], options: dict[str, Any], known: dict[str, Path], jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured of each type with every effort, so many at a time, as soon as a type has all."""
    threads = str(max(1, num_threads() // jobs))
    os.environ |= dict.fromkeys(("UQFF_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    rows: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        asked: dict[Future[dict[str, Any]], tuple[str, str]] = {}
        for effort, how in reversed(EFFORTS.items()):  # those that take longest first
            given = {key: known[key] if value is True else value for key, value in how.items()}
            asked |= {pool.submit(row_of, path, kind, options, **given): (kind, effort) for kind in kinds}
        for done in as_completed(asked):
            kind, effort = asked[done]
            rows[kind][effort] = done.result()
            if len(rows[kind]) == len(EFFORTS):
                yield kind, {each: rows[kind][each] for each in EFFORTS}


def measure(name: str, kinds: list[str], context: int, windows: int, folder: Path, jobs: int) -> dict[str, Any]:
    """The tables of a model, of these types and those that were measured before."""
    path = model_of(name, folder)
    texts = {part: corpus.write(part, folder / f"{part}.txt", 400_000) for part in ("calibrate", "evaluate")}
    options: dict[str, Any] = {"text": texts["evaluate"], "context": context, "windows": windows}
    logits, table = (folder / f"{name}-{context}-{windows}.{end}" for end in ("logits", "json"))
    document: dict[str, Any] = {"model": name, "context": context, "windows": windows, "types": {}, "mixes": {}}
    document |= {"calibrated": CALIBRATED * windows, "python": platform.python_version(), "machine": machine()}
    if table.exists():
        kept = json.loads(table.read_text())
        same = all(kept.get(key) == document[key] for key in ("calibrated", "python"))
        document = kept if same else document | {key: kept[key] for key in ("perplexity",) if key in kept}
    if not logits.exists() or "perplexity" not in document:
        plain = uqff.evaluate(path, keep_logits=logits, **options)
        document["perplexity"] = plain.perplexity.document
        table.write_text(json.dumps(document, indent=2))
        click.echo(f"{name}: perplexity {plain.perplexity.value:.4f} ± {plain.perplexity.error:.4f}")
    options["logits"] = logits
    calibrating: dict[str, Any] = {"text": texts["calibrate"], "context": context}
    sizes = {each.kind: each for each in uqff.plan_types(path, kinds=kinds).sizes}
    wanted = [kind for kind in kinds if not sizes[kind].problem and kind not in document["types"]]
    if wanted:
        known = known_of(path, folder / f"{name}-{context}-{CALIBRATED * windows}", CALIBRATED * windows, calibrating)
        for kind, row in rows_of(path, wanted, options, known, jobs):
            document["types"][kind] = {"bits": sizes[kind].bits_per_weight, **row}
            click.echo(f"  {kind}: " + ", ".join(f"{each} {row[each]['kld']:.5f}" for each in EFFORTS))
            table.write_text(json.dumps(document, indent=2))
    if name == "small" and len(document["mixes"]) < len(TARGETS):
        planning: dict[str, Any] = {**calibrating, "kinds": default_kinds(), "windows": PLANNED}
        plan = uqff.plan_types(path, bits=4.5, **planning)
        write_frontier(plan, folder / f"{name}.svg")
        for bits in TARGETS:
            if str(bits) not in document["mixes"]:
                document["mixes"][str(bits)] = mix_of(path, plan, bits, options)
                table.write_text(json.dumps(document, indent=2))
    table.write_text(json.dumps(document, indent=2))
    return document


def mix_of(path: Path, plan: Any, bits: float, options: dict[str, Any]) -> dict[str, Any]:
    """The mix of a size, and the best uniform type of as much or up to half a bit more."""
    mix = within_size(plan.units, int(bits * plan.weights / 8))
    kinds = {unit.name: each.kind for unit, each in zip(plan.units, mix.chosen, strict=True)}
    row = row_of(path, "q8_0", options, recipe=parse_recipe(topology(kinds)))
    near = {each.name: each for each in plan.uniform if each.nbytes >= mix.nbytes}
    near = {name: each for name, each in near.items() if each.bits_per_weight <= bits + 0.55}
    best = {name: row_of(path, name, options, promote=False)["kld"] for name in near}
    rival = min(best, key=lambda each: best[each])
    row |= {"bits": 8 * mix.nbytes / plan.weights, "predicted": mix.cost}
    row |= {"rival": rival, "rival_bits": near[rival].bits_per_weight, "rival_kld": best[rival]}
    click.echo(f"  mix of {bits} bits: {row['kld']:.5f}, {rival} {best[rival]:.5f}")
    return row


def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    windows = f"{document['windows']} windows of {document['context']} tokens"
    table = Table(title=f"{document['model']}: perplexity {document['perplexity']['value']:.4f}, {windows}")
    for column in (
        "type",
        "bits/weight",
        "perplexity",
        "99 % KLD",
        "same top, %",
        *(f"KLD, {each}" for each in EFFORTS),
    ):
        table.add_column(column)
    for kind, row in sorted(document["types"].items(), key=lambda each: each[1]["bits"]):
        plain = row["plain"]
        numbers = f"{plain['perplexity']:.4f}", f"{plain['kld_99']:.4f}", f"{100 * plain['same_top']:.2f}"
        far = [f"{row[each]['kld']:.5f} ± {row[each]['kld_error']:.5f}" for each in EFFORTS]
        table.add_row(kind, f"{row['bits']:.3f}", *numbers, *far)
    Console().print(table)
    if document["mixes"]:
        mixes = Table(title="mixes of `uqff plan`, and the best uniform type of as much or up to half a bit more")
        for column in ("asked", "bits/weight", "predicted KLD", "KLD", "type", "its bits", "its KLD", "ratio"):
            mixes.add_column(column)
        for asked, row in document["mixes"].items():
            ratio = row["kld"] / row["rival_kld"]
            ours = [f"{row[each]:.5f}" for each in ("predicted", "kld")]
            theirs = (row["rival"], f"{row['rival_bits']:.3f}", f"{row['rival_kld']:.5f}")
            style = None if ratio <= REACH else "red"
            mixes.add_row(asked, f"{row['bits']:.3f}", *ours, *theirs, f"{ratio:.2f}", style=style)
        Console().print(mixes)


@click.command()
@click.option("--models", default="small,smollm2", show_default=True)
@click.option("--types", help="All that the engine makes and loads, by default; of SmolLM2 those of 2 to 5 bits.")
@click.option("--context", default=256, show_default=True)
@click.option("--windows", default=16, show_default=True, help="Of SmolLM2, a quarter of them.")
@click.option("--jobs", default=1, show_default=True, help="Rows measured at a time, which share the threads.")
def main(models: str, types: str | None, context: int, windows: int, jobs: int) -> None:
    """Measure the types on two trained models."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    for name in models.split(","):
        kinds = (types or (",".join(default_kinds()) if name == "small" else FEW_TYPES)).split(",")
        show(measure(name, kinds, context, windows if name == "small" else max(1, windows // 4), folder, jobs))


if __name__ == "__main__":
    main()
