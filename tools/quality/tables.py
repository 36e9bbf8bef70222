"""The tables of documentation that `make quality` measures: written where pages have a mark for them.

    python -m tools.quality.tables

Between `<!-- measured: MODEL TABLE -->` and `<!-- end -->` comes what the kept JSON of a model has: what is written is
what was measured, with its settings and machine. The picture of the README is that of the same run.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tools.generated import ROOT, settle
from tools.quality.__main__ import cache
from tools.quality.row import EFFORTS

PAGES = tuple(ROOT / "docs" / "pages" / "tasks" / f"{name}.md" for name in ("quantize", "plan"))
PICTURE = ROOT / "docs" / "pages" / "tasks" / "frontier.svg"
MARK = re.compile(r"(<!-- measured: (\w+) (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
TITLES = {"small": "the small Llama of `make quality`", "smollm2": "SmolLM2-135M"}


def settings(document: dict[str, Any], what: str) -> str:
    """What was measured, and where."""
    perplexity = document["perplexity"]
    told = (
        f"{what} of {TITLES[document['model']]} (perplexity {perplexity['value']:.2f} ± "
        f"{perplexity['error']:.2f}) on {document['windows']} windows of {document['context']} tokens of one part of "
        f"Python {document['python']}'s standard library; importance and Hessians of {document['calibrated']} windows "
        f"of another; {document['machine']}"
    )
    return f"{textwrap.fill(f'{told}; {note}.' if (note := document.get('note')) else f'{told}.', 120)}\n"


def efforts(document: dict[str, Any]) -> str:
    """The divergence of every type and effort."""
    heads = ["type", "bits/weight", *EFFORTS]
    rows = [heads, ["---"] * len(heads)]
    for kind, row in sorted(document["types"].items(), key=lambda each: (each[1]["bits"], each[0])):
        found = [f"{digits(row[each]['kld'], 3)} ± {digits(row[each]['kld_error'], 2)}" for each in EFFORTS]
        rows.append([kind, f"{row['bits']:.2f}", *found])
    return f"{settings(document, 'Mean KL divergence, in thousandths,')}\n{lines(rows)}"


def digits(value: float, count: int) -> str:
    """So many of a thousandth."""
    return f"{1000 * value:#.{count}g}".rstrip(".")


def mixes(document: dict[str, Any]) -> str:
    """Mixes beside the best type of at least their size."""
    heads = ["asked", "mix, bits/weight", "predicted KLD", "KLD", "all of one type, bits/weight", "KLD", "ratio"]
    rows = [heads, ["---"] * len(heads)]
    for asked, row in document["mixes"].items():
        ours = [f"{row['bits']:.3f}", f"{row['predicted']:.5f}", f"{row['kld']:.5f} ± {row['kld_error']:.5f}"]
        theirs = [f"{row['rival']}, {row['rival_bits']:.3f}", f"{row['rival_kld']:.5f}"]
        rows.append([asked, *ours, *theirs, f"{row['kld'] / row['rival_kld']:.2f}"])
    return f"{settings(document, 'Mean KL divergence')}\n{lines(rows)}"


def lines(rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"efforts": efforts, "mixes": mixes}


def wanted(folder: Path) -> Iterator[tuple[Path, str]]:
    """The pages with what was measured last."""
    documents: dict[str, dict[str, Any]] = {}
    for name in TITLES:
        found = sorted(folder.glob(f"{name}-*.json"), key=lambda each: each.stat().st_mtime)
        documents |= {name: json.loads(found[-1].read_text())} if found else {}

    def filled(match: re.Match[str]) -> str:
        document = documents.get(match[2])
        if document is None or not document["types" if match[3] == "efforts" else "mixes"]:
            return match[0]
        return f"{match[1]}{TABLES[match[3]](document)}{match[5]}"

    for page in PAGES:
        yield page, MARK.sub(filled, page.read_text("utf-8"))
    picture = folder / "small.svg"
    if picture.exists():
        yield PICTURE, picture.read_text("utf-8").replace(">small:", ">a small Llama:")


@click.command()
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where tables are kept.")
def main(folder: Path | None) -> None:
    """Write the tables into the documentation."""
    settle(wanted(folder or cache()), check=False)


if __name__ == "__main__":
    main()
