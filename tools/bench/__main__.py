"""``make bench``: speed beside other tools, in one run on the machine at hand, as Markdown and JSON."""

from __future__ import annotations

import importlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tools.bench.machine import facts
from tools.generated import ROOT, settle

SECTIONS = {
    "opening": "Opening a 1 GiB file of 128 layers and making every layer",
    "quantising": "Quantising 4096 × 4096 float32, warm",
    "efforts": "Relative RMS error of normal weights, to the engine's bytes and with effort best",
    "dequantising": "Dequantising 4096 × 4096 into a warm buffer",
    "compiling": "First use of a type, quantising and dequantising: compiled once, then cached",
    "engine": "mistral.rs, type by type: a model of 250 million weights",
    "sharding": "What one rank holds and reads of a file",
    "multiplying": "Products with 4096 × 4096 straight from the codes, float32 activations: medians (least)",
    "scaling": "Products with 4096 × 4096 by number of threads, the least of several: milliseconds",
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


MARK = re.compile(r"(<!-- measured: bench (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PAGES = (ROOT / "docs" / "pages" / "benchmarks.md", ROOT / "README.md")
SUMMARIES = {"products": "multiplying"}
"""Places for a section's ``summary(rows)``."""


def filled(page: str, result: dict[str, Any]) -> str:
    """A page with the tables of the sections that were measured in their places, and the machine above each."""
    machine = result["machine"]
    names = ("processor", "threads", "python", "torch", "numba")
    told = ", ".join(machine[name] if name == "processor" else f"{name} {machine[name]}" for name in names)
    told = textwrap.fill(f"{told}; load when begun {machine['load when begun']}.", 120)

    def table(match: re.Match[str]) -> str:
        rows = result.get(match[2])
        return f"{match[1]}{told}\n\n{markdown(rows)}{match[4]}" if rows else match[0]

    return MARK.sub(table, page)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Run this section only; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option(
    "--page", is_flag=True, help="Put tables where docs/pages/benchmarks.md and README.md have places for them."
)
def main(only: tuple[str, ...], out: Path, page: bool) -> None:
    """Measure, print, and write OUT/bench.md and OUT/bench.json."""
    console = Console()
    machine = facts()
    result: dict[str, Any] = {"machine": machine}
    summaries: dict[str, Any] = {}
    text = "# Benchmarks\n\n" + "\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n"
    console.print(text, highlight=False)
    for section in only or SECTIONS:
        module = importlib.import_module(f"tools.bench.{section}")
        result[section] = rows = module.measure()
        summaries |= {place: module.summary(rows) for place, of in SUMMARIES.items() if of == section}
        part = f"\n## {SECTIONS[section]}\n\n{markdown(rows)}"
        console.print(part, highlight=False, soft_wrap=True)
        text += part
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text(text, "utf-8")
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if page:
        settle([(path, filled(path.read_text("utf-8"), result | summaries)) for path in PAGES], check=False)
    console.print(f"Written to {out}/bench.md and {out}/bench.json")


if __name__ == "__main__":
    main()
