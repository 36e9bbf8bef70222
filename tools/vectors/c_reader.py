"""The second reader, ``spec/readers/c``: compiled with sanitizers, and run on all vectors.

Where there is no C compiler its cases are counted as not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools.vectors.conformance import Outcome, lines_of, read_index, run_all
from tools.vectors.index import ENCODER

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = ROOT / "spec" / "readers" / "c"
VECTORS: Final = ROOT / "spec" / "vectors"

FLAGS: Final = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g")
SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiler() -> str | None:
    """The C compiler: ``$CC``, else ``cc``; None if there is none."""
    return shutil.which(os.environ.get("CC", "cc"))


def compile_reader(target: Path, flags: Sequence[str] = (*FLAGS, *SANITIZERS)) -> Path:
    """Compile it.

    Args:
        target: the program to write.
        flags: of the compiler.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.CalledProcessError: it does not compile, which its ``stderr`` explains.
    """
    program = compiler()
    if program is None:
        raise FileNotFoundError("no C compiler")
    sources = map(str, sorted(SOURCES.glob("*.c")))
    subprocess.run([program, *flags, *sources, "-o", str(target)], check=True, capture_output=True, text=True)
    return target


def check_all(folder: Path) -> list[Outcome] | None:
    """Every vector of a reader, read; None where there is no compiler.

    Args:
        folder: for the program.
    """
    if compiler() is None:
        return None
    return list(run_all(str(compile_reader(folder / "uqff-read")), VECTORS))


def report(outcomes: list[Outcome] | None) -> list[str]:
    """What to print of it."""
    if outcomes is None:
        idle = sum(case["class"] != ENCODER for case in read_index(VECTORS))
        return [f"no C compiler: {idle} vectors not run with spec/readers/c"]
    failed = sum(each.problem is not None for each in outcomes)
    return [*lines_of(outcomes), f"spec/readers/c: {len(outcomes)} vectors, {failed} differ"]
