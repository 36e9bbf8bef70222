"""Whether the vectors notice a check that is missing: each check of the C reader is removed in turn.

    python -m tools.vectors.checks          # make checks; needs a C compiler

A reader without the check must take a broken vector that it should refuse, or refuse a valid one, or crash.  What no
vector notices is a rule that a reader can forget; those in `NEEDLESS` cannot be noticed, for the reason beside them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tools.vectors.c_reader import SANITIZERS, SOURCES, VECTORS, compiler
from tools.vectors.conformance import read_index
from tools.vectors.index import ENCODER

CHECK: Final = re.compile(
    r"if \((?P<condition>(?:[^;{}]|'\{')*?)\)\s+(?P<then>FAIL\([^;]*;|return bad\([^;]*;|return uqff_fail\([^;]*;"
    r"|FALSE;|return 0;)",
)
_CUT = "a text that the header's end cuts off is refused for its missing end, whatever is read behind it"
NEEDLESS: Final[dict[str, str]] = {
    "length > (size_t)(end - at)": _CUT,
    "p->end - p->at < 4": _CUT,
    "p->end - p->at < 2": _CUT,
    "p->at == p->end": _CUT,
    "offsets[1] < offsets[0]": "no size fits a reversed range",
    "offsets[1] > data.size": "no size fits, or the last tensor does not end with the file",
    "by_name(&mine[i - 1], &mine[i]) == 0": "the entries of all shards are searched for two of one name again",
    "size == 0": "an empty weight is refused again, and no bias or scale of another size fits a weight",
}
"""Words of a check, to the reason why no file can show that it is missing: it keeps the reader within its memory, or
another one refuses the same."""
TIMEOUT: Final = 60


class Check(NamedTuple):
    """A check of the C reader, as text of a file."""

    file: str
    line: int
    start: int
    end: int
    text: str


def checks() -> Iterator[Check]:
    """All of them: conditions on which the reader refuses."""
    for path in sorted(SOURCES.glob("*.c")):
        source = path.read_text("utf-8")
        for found in CHECK.finditer(source):
            if path.name != "main.c" and "NULL" not in found["condition"].replace("take(c", ""):
                start, end = found.span("condition")
                text = " ".join(found.group().split())
                yield Check(path.name, source.count("\n", 0, start) + 1, start, end, text)


def outcomes(program: Path, cases: list[dict[str, object]]) -> list[str]:
    """What a reader says to each case; fewer, if it crashes."""
    lines = "".join("\t".join(str(VECTORS / file) for file in case["files"]) + "\n" for case in cases)  # type: ignore[attr-defined]
    try:
        done = subprocess.run([program, "-"], input=lines, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [json.loads(line)["outcome"] for line in done.stdout.splitlines()]


def build(folder: Path, changed: Check | None) -> Path:
    """The reader, without a check; what does not change is compiled once for a folder."""
    objects = []
    for path in sorted(SOURCES.glob("*.[ch]")):
        source, copy = path.read_text("utf-8"), folder / path.name
        if changed is not None and path.name == changed.file:
            source = f"{source[: changed.start]}0 && ({source[changed.start : changed.end]}){source[changed.end :]}"
            copy = folder / f"changed-{path.name}"
        made = copy.with_suffix(".o")
        if changed is None or path.name == changed.file:
            copy.write_text(source, "utf-8")
        if path.suffix == ".c":
            objects.append(str(made))
    targets = [Path(each).with_suffix(".c") for each in objects if changed is None or "changed-" in each]
    for target in targets:
        command = [str(compiler()), "-std=c99", "-O0", "-w", *SANITIZERS, "-c", str(target)]
        subprocess.run([*command, "-o", str(target.with_suffix(".o"))], check=True)
    program = folder / "reader"
    subprocess.run([str(compiler()), *SANITIZERS, *objects, "-o", str(program)], check=True)
    return program


def unnoticed() -> Iterator[Check]:
    """The checks without which the reader is right about every vector.

    Raises:
        ValueError: the reader is wrong as it is.
    """
    cases = [case for case in read_index(VECTORS) if case["class"] != ENCODER]
    wanted = [case["outcome"] for case in cases]
    with tempfile.TemporaryDirectory() as directory:
        if outcomes(build(Path(directory), None), cases) != wanted:
            raise ValueError("spec/readers/c is wrong about the vectors")
        for check in checks():
            if outcomes(build(Path(directory), check), cases) == wanted:
                yield check


def main() -> int:
    """See the module docstring."""
    total = len(list(checks()))
    survivors = [check for check in unnoticed() if not any(words in check.text for words in NEEDLESS)]
    for check in survivors:
        print(f"{check.file}:{check.line}: no vector needs it: {check.text}")
    print(f"{total} checks, {len(survivors)} that no vector needs")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
