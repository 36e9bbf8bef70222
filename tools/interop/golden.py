"""Rows that a client cannot run on this CPU, proven from its golden files instead, for `tools/interop`.

`tests/golden/v0` holds what the 0.6.0 client wrote on a CPU that it runs on (its index has version, platform and
digests). Of every type that was not run: saved again by this package, each of its golden files must be the same file;
and the package must make every byte of its layers from the same weights. What the client generates is not in golden
files: that is proven on CPUs that have what it was built for, only.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

import uqff
from tools.golden import v0 as golden
from tools.interop.cases import Case
from tools.interop.quantisers import WHEEL, Written, check
from tools.interop.reading import MIXED, UQFF_VERSION
from tools.interop.stored_parts import read_parts


@dataclasses.dataclass(frozen=True)
class Proof:
    """What golden files say of a type: how many there are, their layers and bytes, and what is wrong."""

    kind: str
    rows: dict[str, int]
    files: int
    layers: int
    size: int
    problems: tuple[str, ...]


def prove(kind: str, rows: dict[str, int]) -> Proof:
    """Compare all golden files of a type, or of mixed types; `rows` says how many rows of which table it stands for."""
    layers = size = 0
    problems: list[str] = []
    cases = [case for case in golden.CASES if (case.topology is not None if kind == MIXED else kind in case.kinds)]
    paths = [
        (case, name, golden.GOLDEN / "v0" / case.name / f"{name}-0.uqff")
        for case in cases
        for name in (case.kinds if kind == MIXED else (kind,))
    ]
    for case, name, path in paths:
        problems += [f"{case.name}/{path.name}: {problem}" for problem in saved_again(path)]
        with uqff.open([path]) as file:
            layers, size = layers + len(file), size + path.stat().st_size
        if case.topology is None:
            row = check(WHEEL, Case(case.name, case.model, case.dtype), name, Written(read_parts(path)))
            problems += [f"{case.name}/{path.name}: {problem}" for problem in row.problems]
    if not paths:
        problems.append("there is no golden file of it")
    return Proof(kind, rows, len(paths), layers, size, tuple(problems))


def saved_again(path: Path) -> list[str]:
    """Whether a file, read and saved by this package, is the same file."""
    with tempfile.TemporaryDirectory() as folder, uqff.open([path]) as file:
        (again,) = uqff.save(file, Path(folder) / path.name, version=UQFF_VERSION)
        return [] if again.read_bytes() == path.read_bytes() else ["saved again, it is another file"]


def prove_all(not_run: Iterable[tuple[str, str]]) -> list[Proof]:
    """The proofs of all rows that were not run, given as table and type."""
    counts = Counter(not_run)
    kinds = dict.fromkeys(kind for _, kind in counts)
    return [prove(kind, {table: n for (table, of), n in counts.items() if of == kind}) for kind in kinds]


def table_of(proofs: list[Proof]) -> Table:
    """All proofs."""
    table = Table(title=f"Not run by mistralrs {WHEEL} on this CPU: proven from tests/golden")
    table.add_column("type", no_wrap=True)
    table.add_column("rows not run")
    for column in ("golden files", "layers", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("saved again, and made from the weights")
    for proof in proofs:
        rows = ", ".join(f"{table} {n}" for table, n in proof.rows.items())
        made = "[red]differs[/red]" if proof.problems else "[green]every byte equal[/green]"
        if proof.kind == MIXED and not proof.problems:
            made = "[green]every byte equal[/green], saved again"
        table.add_row(proof.kind, rows, str(proof.files), str(proof.layers), f"{proof.size:,}", made)
    return table
