"""``make bench``: speed beside other tools, in one run on the machine at hand, as Markdown and JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click
from rich.console import Console

from tools.bench.machine import facts

SECTIONS = {
    "opening": "Opening a 1 GiB file of 128 layers and making every layer",
    "quantising": "Quantising 4096 × 4096 float32, warm",
    "efforts": "Relative RMS error of normal weights, to the engine's bytes and with effort best",
    "dequantising": "Dequantising 4096 × 4096 into a warm buffer",
    "compiling": "First use of a type, quantising and dequantising: compiled once, then cached",
    "engine": "mistral.rs, type by type: a model of 250 million weights",
    "sharding": "What one rank holds and reads of a file",
    "multiplying": "Products with 4096 × 4096 straight from the codes, float32 activations: medians (least)",
    "loading": "Loading a model of 1 GiB on ranks that share this machine, page cache warm",
    "immediate": "Quantising a checkpoint of 250 million weights to q4k while it is loaded (immediate ISQ)",
    "generating": "Tokens a second of a small model, one at a time",
    "rates": "Tokens a second of larger random models, two threads",
    "models": "Quantising a whole model: whole process, page cache warm, kernels cached",
}
"""Each is a module with ``measure() -> list of rows``."""


def markdown(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table; the first row names the columns."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Run this section only; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
def main(only: tuple[str, ...], out: Path) -> None:
    """Measure, print, and write OUT/bench.md and OUT/bench.json."""
    console = Console()
    machine = facts()
    result: dict[str, object] = {"machine": machine}
    text = "# Benchmarks\n\n" + "\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n"
    console.print(text, highlight=False)
    for section in only or SECTIONS:
        rows = importlib.import_module(f"tools.bench.{section}").measure()
        result[section] = rows
        part = f"\n## {SECTIONS[section]}\n\n{markdown(rows)}"
        console.print(part, highlight=False, soft_wrap=True)
        text += part
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text(text, "utf-8")
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    console.print(f"Written to {out}/bench.md and {out}/bench.json")


if __name__ == "__main__":
    main()
