"""Check against the real clients, in several tables; exit 1 on any difference.

    python -m tools.interop            # make interop

Files (`reading`): the 0.6.0 client must take the files that this package writes for its own. Entries
(`entries`): the same for 1.x files and the 0.9.5 client. Quantisers (`quantisers`): from the same
weights, the package must make every byte that the 0.6.0 and 0.9.5 clients store, for every type, several shapes and
load dtypes. Migration (`migration`): the 0.9.5 client must run migrated pre-1.0 models as it runs its own, and
as the 0.6.0 client runs the originals; and the other way round. Converted (`gguf`): the 0.9.5 client must say
the same with a GGUF file and with the UQFF that it is converted to, there and back; and of models that see, with UQFF
of both files and of the checkpoint (`seeing`); and with what transformers saves of UQFF (`saving`).
Running (`running`): from the clients' files, the package must generate what they do, on 1, 2 and 4 ranks. Kept
(`kept`): what other libraries quantised and this package keeps, the 0.9.5 client must run as it is. Configurations
(`configs`): from the `config.json` of either generation of transformers, the package must write one that the 0.9.5
client and both generations read as the same model. llama.cpp (`llamacpp`): it and the package must generate the same
from GGUF files, a real model's among them, which must come back from UQFF as they were. The second reader (`reader`):
what is written in C from the spec alone must find in every vector what the spec says. Schemas (`schemas`): so must what
Kaitai Struct's compiler makes of `spec/schemas/uqff.ksy`.

The clients are installed once, into `.venvs/` at the root of the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console

from tools.interop import (
    architectures,
    configs,
    entries,
    golden,
    kept,
    migration,
    quantisers,
    reading,
    running,
)
from tools.interop.cases import CASES
from tools.interop.client import Client
from tools.interop.install import TRANSFORMERS, has, install_client, install_llamacpp
from tools.schemas import compiled
from tools.vectors import c_reader
from uqff.quantization.types import KINDS

WIDTH = 150
"""Columns of the tables where the output is not a terminal."""

LAST_LINES = 40
"""Lines of a table that failed which are printed once more."""

FILES, ENTRIES, QUANTISERS = "files", "entries", "quantisers"
MIGRATION, CONVERTED, RUNNING = "migration", "converted", "running"
KEPT, CONFIGURATIONS, LLAMACPP, READER, SCHEMAS = "kept", "configurations", "llama.cpp", "reader", "schemas"
NotRun = list[tuple[str, str]]
"""Rows that a client could not run on this CPU: table and type."""
TABLES = (FILES, ENTRIES, QUANTISERS, MIGRATION, CONVERTED, RUNNING, KEPT, CONFIGURATIONS, LLAMACPP, READER, SCHEMAS)
ALONE = (LLAMACPP, SCHEMAS, READER)
"""Tables that need no mistralrs."""
NIGHTLY = (CONVERTED, KEPT, LLAMACPP, READER, SCHEMAS)
"""Tables that `--few` leaves out: of other formats than UQFF, and of readers made from the spec, which few changes
concern."""
LONGEST_FIRST = (
    QUANTISERS,
    RUNNING,
    MIGRATION,
    ENTRIES,
    FILES,
    CONVERTED,
    CONFIGURATIONS,
    KEPT,
    LLAMACPP,
    READER,
    SCHEMAS,
)


class Chosen(NamedTuple):
    """Of each table: rows of these `kinds`, if there are any; `few` of them, see `tools.interop.few`."""

    kinds: tuple[str, ...] = ()
    few: bool = False


def find_clients(given: tuple[Path, ...]) -> dict[str, Client]:
    """A client of each version, by version: those given, and the others installed.

    Raises click.ClickException for an interpreter that has no such version.
    """
    clients = {Client(python).about()["version"]: Client(python) for python in given}
    unknown = sorted(clients.keys() - quantisers.GENERATIONS.keys())
    if unknown:
        raise click.ClickException(f"expected mistralrs {', '.join(quantisers.GENERATIONS)}, got {', '.join(unknown)}")
    return {
        version: clients[version] if version in clients else Client(install_client(version))
        for version in quantisers.GENERATIONS
    }


def check_files(client: Client, chosen: Chosen, console: Console, not_run: NotRun) -> bool:
    """Print the table of the files and what differs; return whether anything does that is not known."""
    with tempfile.TemporaryDirectory() as folder:
        results = list(reading.check_all(client, reading.all_jobs(chosen.kinds, few=chosen.few), Path(folder)))
    console.print(reading.table_of(results))
    for line in reading.differences(results):
        console.print(line)
    failed = sum(not result.equal and not result.known for result in results)
    known = sum(result.known for result in results)
    idle = sum(result.theirs.generation is None and not result.not_run for result in results)
    missed = [(FILES, result.kind) for result in results if result.not_run]
    not_run += missed
    console.print(
        f"{len(results)} rows: {failed} differ, {known} differ by the 0.6.0 wheel's Q3K and nothing else, "
        f"{idle} that the client itself cannot run, {len(missed)} not run on this CPU"
    )
    return failed > 0


def check_entries(client: Client, chosen: Chosen, console: Console) -> bool:
    """Print the table of the 1.x files; return whether anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        results = list(entries.check_all(client, entries.all_jobs(chosen.kinds, few=chosen.few), Path(folder)))
    console.print(entries.table_of(results))
    failed = sum(not result.equal for result in results)
    idle = sum(result.theirs.generation is None for result in results)
    console.print(f"{len(results)} checked: {failed} differ, {idle} that the client itself cannot run here")
    with tempfile.TemporaryDirectory() as folder:
        jobs = architectures.all_jobs(chosen.kinds, few=chosen.few)
        rows = list(architectures.check_all(client, jobs, Path(folder)))
    console.print(architectures.table_of(rows))
    wrong = sum(row.problem is not None for row in rows)
    console.print(f"{len(rows)} checked: {wrong} differ")
    return failed + wrong > 0


def check_quantisers(
    clients: dict[str, Client], chosen: Chosen, models: tuple[str, ...], console: Console, not_run: NotRun
) -> bool:
    """Print the table of the quantisers and what differs; return whether anything does."""
    cases = tuple(case for case in CASES if not models or case.name in models)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(quantisers.check_all(clients, cases, chosen.kinds, Path(folder), few=chosen.few))
    console.print(quantisers.table_of(rows))
    failed = [row for row in rows if not row.equal]
    for row in failed:
        for problem in row.problems:
            console.print(f"{row.version} {row.case} {row.kind} ({row.by}): {problem}")
    missed = [(QUANTISERS, row.kind) for row in rows if row.not_run]
    not_run += missed
    console.print(f"{len(rows)} rows: {len(failed)} differ, {len(missed)} not run on this CPU")
    return bool(failed)


def check_migration(clients: dict[str, Client], chosen: Chosen, console: Console, not_run: NotRun) -> bool:
    """Print the table of the migrations and what is wrong; return whether anything is."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = migration.all_jobs(chosen.kinds, few=chosen.few)
        results = list(migration.check_all(clients, jobs, Path(folder)))
    console.print(migration.table_of(results))
    failed = [result for result in results if result.problems]
    for result in failed:
        for problem in result.problems:
            console.print(f"{result.case} {result.kind} {result.way}: {problem}")
    missed = [(MIGRATION, result.kind) for result in results if result.not_run]
    not_run += missed
    console.print(f"{len(results)} rows: {len(failed)} differ, {len(missed)} not run in 0.6.0 on this CPU")
    return bool(failed)


def check_converted(clients: dict[str, Client], console: Console) -> bool:
    """Print the table of the conversions and what differs; return whether anything does."""
    from tools.interop import gguf as converting  # models run in it, whose libraries other tables do not wait for
    from tools.interop import saving, seeing

    with tempfile.TemporaryDirectory() as folder:
        client = clients[converting.CLIENT_VERSION]
        rows = [row for table in (converting, seeing, saving) for row in table.check_all(client, Path(folder))]
    console.print(converting.table_of(rows))
    failed = [row for row in rows if row.problem is not None]
    for row in failed:
        console.print(f"{row.case} ({row.compared}): {row.problem}", markup=False)
    console.print(f"{len(rows)} checked: {len(failed)} differ")
    return bool(failed)


def check_llamacpp(chosen: Chosen, console: Console) -> bool:
    """Print the table of llama.cpp; return whether anything differs."""
    from tools.interop import llamacpp  # likewise

    python = install_llamacpp()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(llamacpp.check_all(python, Path(folder), few=chosen.few))
    console.print(llamacpp.table_of(rows))
    failed = [row for row in rows if row.problem is not None]
    for row in failed:
        console.print(f"{row.model} {row.kind}: {row.problem}", markup=False)
    idle = sum(row.idle for row in rows)
    console.print(f"{len(rows)} checked: {len(failed)} differ, {idle} that llama.cpp cannot run on this CPU")
    return bool(failed)


def check_reader(console: Console) -> bool:
    """Print what the second reader makes of the vectors; return whether anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = c_reader.check_all(Path(folder))
    for line in c_reader.report(outcomes):
        console.print(line, markup=False)
    return any(outcome.problem is not None for outcome in outcomes or ())


def check_schemas(console: Console) -> bool:
    """Print what the compiled schema makes of the valid vectors; return whether anything differs."""
    rows = compiled.check_all()
    for line in compiled.report(rows):
        console.print(line, markup=False)
    return any(row.problem is not None for row in rows or ())


def check_running(clients: dict[str, Client], chosen: Chosen, console: Console, not_run: NotRun) -> bool:
    """Print the table of the runs; return whether anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        rows = running.check_all(clients, running.all_jobs(chosen.kinds, few=chosen.few), Path(folder))
    console.print(running.table_of(rows))
    failed = sum(not row.equal for row in rows)
    idle = sum(row.case.generation is None and not row.case.not_run for row in rows)
    missed = [(RUNNING, row.case.kind) for row in rows if row.case.not_run]
    not_run += missed
    console.print(
        f"{len(rows)} rows: {failed} differ, {idle} that the client itself cannot run, "
        f"{len(missed)} not run by it on this CPU"
    )
    return failed > 0


def check_kept(client: Client, console: Console) -> bool:
    """Print the table of checkpoints that were kept; return whether anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        rows = kept.check_all(client, Path(folder))
    console.print(kept.table_of(rows))
    failed = kept.failed(rows)
    console.print(f"{len(rows)} checked: {len(failed)} differ")
    return bool(failed)


def check_golden(not_run: NotRun, console: Console) -> bool:
    """Print what golden files say of the rows that were not run; return whether any of them differs."""
    proofs = golden.prove_all(not_run)
    console.print(golden.table_of(proofs))
    for proof in proofs:
        for problem in proof.problems:
            console.print(f"{proof.kind}: {problem}", markup=False)
    failed = sum(bool(proof.problems) for proof in proofs)
    console.print(f"{len(not_run)} rows not run on this CPU, of {len(proofs)} types: golden files of {failed} differ")
    return failed > 0


def check_configurations(client: Client, console: Console) -> bool:
    """Print the table of the configurations and what differs; return whether anything does."""
    own = Path(sys.executable)
    readers = {
        generation: own if has("transformers", version) else install_client(version, "transformers")
        for generation, version in TRANSFORMERS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = list(configs.check_all(client, readers, Path(folder)))
    console.print(configs.table_of(rows))
    failed = sum(row.problem is not None for row in rows)
    console.print(f"{len(rows)} checked: {failed} differ")
    return failed > 0


@click.command()
@click.option(
    "--client",
    "pythons",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Interpreter that has mistralrs 0.6.0 or 0.9.5; else they are installed.",
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS, reading.MIXED]), help="Only these.")
@click.option("--only", multiple=True, type=click.Choice(TABLES), help="Only these tables.")
@click.option("--few", is_flag=True, help="Some tables, and of most of them some rows of each model, see few.py.")
@click.option("--two", is_flag=True, help="In two processes, for two cores.")
@click.option(
    "--model", "models", multiple=True, type=click.Choice([case.name for case in CASES]), help="Only these quantised."
)
def main(
    pythons: tuple[Path, ...],
    kinds: tuple[str, ...],
    only: tuple[str, ...],
    models: tuple[str, ...],
    *,
    few: bool,
    two: bool,
) -> None:
    """Check this package's files, quantisers and migrations against the real clients; exit 1 on any difference."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    start = time.monotonic()
    only = only or tuple(table for table in TABLES if not few or table not in NIGHTLY)
    if two:
        options = [f"--kind={kind}" for kind in kinds] + [f"--model={model}" for model in models]
        options += ["--few"] if few else []
        tables = [table for table in LONGEST_FIRST if table in only]
        failed = check_side_by_side(tables, options, lambda: find_clients(pythons))
        console.print(f"{time.monotonic() - start:.0f} s")
        sys.exit(1 if failed else 0)
    clients = find_clients(pythons) if not {*only} <= {*ALONE} else {}
    if clients:
        about = clients[reading.CLIENT_VERSION].about()
        console.print(f"mistralrs {', '.join(clients)} on {about['system']} {about['machine']}, {about['libc']}")
    for version, client in clients.items():
        if missing := client.missing():
            console.print(
                f"mistralrs {version} takes {' and '.join(missing)} for granted, which this CPU lacks: rows that it "
                "cannot run are counted, and proven from golden files"
            )
    failed, not_run, chosen = False, NotRun(), Chosen(kinds, few)
    checks: dict[str, Callable[[], bool]] = {
        FILES: lambda: check_files(clients[reading.CLIENT_VERSION], chosen, console, not_run),
        ENTRIES: lambda: check_entries(clients[entries.CLIENT_VERSION], chosen, console),
        QUANTISERS: lambda: check_quantisers(clients, chosen, models, console, not_run),
        MIGRATION: lambda: check_migration(clients, chosen, console, not_run),
        CONVERTED: lambda: check_converted(clients, console),
        RUNNING: lambda: check_running(clients, chosen, console, not_run),
        KEPT: lambda: check_kept(clients[kept.CLIENT_VERSION], console),
        CONFIGURATIONS: lambda: check_configurations(clients[configs.CLIENT_VERSION], console),
        LLAMACPP: lambda: check_llamacpp(chosen, console),
        READER: lambda: check_reader(console),
        SCHEMAS: lambda: check_schemas(console),
    }
    for table in TABLES:
        if table in only:
            begin = time.monotonic()
            failed |= checks[table]()
            console.print(f"{table}: {time.monotonic() - begin:.0f} s")
    if not_run:
        failed |= check_golden(not_run, console)
    console.print(f"{time.monotonic() - start:.0f} s")
    sys.exit(1 if failed else 0)


def check_side_by_side(tables: Sequence[str], options: Sequence[str], find: Callable[[], dict[str, Client]]) -> bool:
    """Check each table in a process of its own, two at a time; print the output of each when it ends.

    Args:
        tables: in the order in which they are begun, but for those that need no mistralrs: these are first.
        options: of the command, for all of them.
        find: gives the clients, which may have to be fetched: meanwhile, tables are checked that need none.

    Returns:
        Whether anything differs. What failed is told last, where a log that is cut keeps it.
    """

    def run(table: str) -> subprocess.CompletedProcess[str]:
        given = [f"--client={client.python}" for client in clients.result().values()] if table not in ALONE else []
        command = [sys.executable, "-m", "tools.interop", *options, *given, f"--only={table}"]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
        )

    # Threads do not spin while they wait for each other, torch's nor those of numpy: other processes need the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1", **os.environ}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(2) as pool:
        clients = pool.submit(find)  # begun before all that wait for it
        first = [table for table in tables if table in ALONE]
        asked = {pool.submit(run, table): table for table in (*first, *(each for each in tables if each not in first))}
        for done in as_completed(asked):
            output = done.result().stdout
            print(output, end="", flush=True)
            if done.result().returncode:
                failed[asked[done]] = output
    for table, output in failed.items():
        print(f"\n{table} failed; its last lines again:", *output.splitlines()[-LAST_LINES:], sep="\n", flush=True)
    return bool(failed)


if __name__ == "__main__":
    main()
