"""Whether the vectors of quantisers notice mistakes: each mutant of the reference must make other bytes of one of them.

    python -m tools.vectors.mutants            # run all, rewrite spec/vectors/encode/MUTANTS.md
    python -m tools.vectors.mutants --check    # write nothing; exit 1 if one survives or the page would differ

A mutant is a passage of a reference's source and what stands in its place (:mod:`tools.vectors.mistakes`).  The module
is run again with that source, and all modules that import from it, and every vector of the types concerned is made.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

from tools.vectors import encodings
from tools.vectors.mistakes import MISTAKES, Mistake

PAGE: Final = Path(__file__).parents[2] / "spec" / "vectors" / "encode" / "MUTANTS.md"
FAMILIES: Final = "uqff.families."
NUMERICS: Final = "uqff.numerics."
REFERENCES: Final = tuple(f"{FAMILIES}{name}.reference" for name in ("afq", "f8q8", "fp8", "hqq", "mxfp4"))
IMPORTERS: Final[dict[str, tuple[str, ...]]] = {
    f"{NUMERICS}packing": REFERENCES,
    f"{NUMERICS}glibc": (f"{FAMILIES}hqq.reference",),
    f"{FAMILIES}gguf.search": (f"{FAMILIES}gguf.reference_quantize",),
}
"""Modules that import names from one, which have to be run again."""


class Result(NamedTuple):
    """A mistake, and the vectors that notice it, by type."""

    mistake: Mistake
    vectors: dict[str, tuple[str, ...]]

    @property
    def unnoticed(self) -> list[str]:
        """The types of which no vector notices it."""
        return [kind for kind, vectors in self.vectors.items() if not vectors]

    @property
    def names(self) -> list[str]:
        """All vectors that notice it."""
        return [name for vectors in self.vectors.values() for name in vectors]

    @property
    def problem(self) -> str | None:
        """What is wrong with the vectors, or the list."""
        if self.mistake.equivalent:
            return f"said to make no difference: {self.mistake.text}: {', '.join(self.names)}" if self.names else None
        unnoticed = self.unnoticed
        return f"no vector notices: {self.mistake.text} ({', '.join(unnoticed)})" if unnoticed else None


def mutated(source: str, mistake: Mistake) -> str:
    """A source with the mistake in it.

    Raises:
        ValueError: the passage is not there exactly once.
    """
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.module}: {source.count(mistake.old)} times {mistake.old!r}: {mistake.text}")
    return source.replace(mistake.old, mistake.new)


def source_of(module: ModuleType) -> str:
    """The text of a module."""
    return Path(str(module.__file__)).read_text("utf-8")


@contextmanager
def made(mistake: Mistake) -> Iterator[None]:
    """The references with a mistake in them."""
    modules = [importlib.import_module(name) for name in (mistake.module, *IMPORTERS.get(mistake.module, ()))]
    sources = [mutated(source_of(modules[0]), mistake), *map(source_of, modules[1:])]
    before = [dict(vars(module)) for module in modules]
    try:
        for module, source in zip(modules, sources, strict=True):
            exec(compile(source, str(module.__file__), "exec"), vars(module))
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(names)


def notices(case: encodings.Case, blob: bytes, inputs: dict[str, encodings.Matrix]) -> bool:
    """Whether the references make other bytes of a case, or none."""
    try:
        return encodings.by_uqff(inputs[case.matrix], case) != blob
    except (ValueError, TypeError, OverflowError):
        return True


def run(mistakes: Iterable[Mistake] = MISTAKES) -> Iterator[Result]:
    """Make each mistake, and all vectors with it."""
    inputs = {matrix.name: matrix for matrix in encodings.matrices()}
    blobs = {case: (encodings.DIRECTORY / f"{case.name}.bin").read_bytes() for case in encodings.cases()}
    with encodings.reference_paths():
        for mistake in mistakes:
            found: dict[str, list[str]] = {kind: [] for kind in mistake.kinds}
            with made(mistake):
                for case in blobs:
                    if case.kind in found and notices(case, blobs[case], inputs):
                        found[case.kind].append(case.name)
            yield Result(mistake, {kind: tuple(names) for kind, names in found.items()})


SHOWN: Final = 2
"""Vectors of a type that the page names for a mistake."""


def page(results: Sequence[Result]) -> str:
    """The page that lists them."""
    rows = "\n".join(
        f"| {', '.join(each.mistake.kinds)} | {each.mistake.text} | {_noticed(each)} |" for each in results
    )
    killed = [each for each in results if not each.mistake.equivalent]
    return f"""# Mistakes that the vectors notice

*Informative.* {len(killed)} mistakes of a quantiser, each made on purpose in the reference implementation, make other
bytes of at least one vector of each type named; {len(results) - len(killed)} more are here because no weights can show
them. `make checks` makes them all.

| types | mistake | noticed by |
|---|---|---|
{rows}
"""


def _noticed(result: Result) -> str:
    if result.mistake.equivalent:
        return f"none can: {result.mistake.equivalent}"
    return ", ".join(f"`{name}`" for vectors in result.vectors.values() for name in vectors[-SHOWN:])


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description="make mistakes in the quantisers, and see whether a vector notices")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on any difference")
    check = parser.parse_args().check
    results = list(run())
    problems = [each.problem for each in results if each.problem]
    text = page(results)
    if not check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        problems.append(f"{PAGE.name} is out of date: python -m tools.vectors.mutants")
    for problem in problems:
        print(problem)
    print(f"{len(results)} mistakes, {sum(bool(each.problem) for each in results)} of them wrong")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
