"""Write all vectors into ``spec/vectors/``; with ``--check``, only say whether anything differs.

    python -m tools.vectors run --command './my-reader {file}'

runs another implementation on all of them instead: see :mod:`tools.vectors.conformance`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.vectors import encodings

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"


def expected_files() -> dict[str, bytes]:
    """Path below ``spec/vectors/`` and content of every generated file."""
    from tools.vectors import bad, bad_entries, client, describe, framing, good, good_entries, index

    files: dict[str, bytes] = {}
    for vector in [*good.synthetic(), *client.written_by_client()]:
        stem = f"{vector.folder}/{vector.name}"
        if f"{stem}.bin" in files:
            raise ValueError(f"two vectors are called {stem}")
        files[f"{stem}.bin"] = vector.blob
        files[f"{stem}.json"] = describe.text(describe.describe(vector)).encode()
    files.update(framing.sound_files())
    files.update(bad.files())
    files.update(good_entries.files())
    files.update(bad_entries.files())
    files.update(encodings.files())
    files.update(index.index_files(files))
    return files


def present_files() -> dict[str, bytes]:
    """Path and content of every generated file that is there."""
    found = (path for path in VECTORS.rglob("*") if path.is_file() and path.suffix != ".md")
    return {path.relative_to(VECTORS).as_posix(): path.read_bytes() for path in found}


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tools.vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing, exit 1 on any difference")
    commands = parser.add_subparsers(dest="task")
    running = commands.add_parser("run", help="run another implementation on the vectors; exit 1 if it is wrong")
    running.add_argument("--command", required=True, help="with {file} where the files of a case go")
    running.add_argument("--class", dest="classes", action="append", default=[], help="only these; repeatable")
    running.add_argument("--rules", action="store_true", help="a line for each rule, not for the rules of some letters")
    given = parser.parse_args()
    return (
        _run(given.command, given.classes, every_rule=given.rules) if given.task == "run" else _write(check=given.check)
    )


def _run(command: str, classes: list[str], *, every_rule: bool) -> int:
    from tools.vectors import conformance

    outcomes = list(conformance.run_all(command, VECTORS, classes))
    for line in conformance.lines_of(outcomes, every_rule=every_rule):
        print(line)
    return int(not outcomes or any(each.problem is not None for each in outcomes))


def _write(*, check: bool) -> int:
    with encodings.reference_paths():  # nothing to compile; tests/spec has kernels make and read the same bytes
        expected, present = expected_files(), present_files()
    changed = sorted(path for path in expected.keys() | present.keys() if expected.get(path) != present.get(path))
    for path in changed:
        print(f"{'differs' if check else 'written' if path in expected else 'removed'}: {path}")
        if not check:
            target = VECTORS / path
            if path in expected:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(expected[path])
            else:
                target.unlink()
    print(f"{len(expected)} files, {len(changed)} {'differ' if check else 'changed'}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
