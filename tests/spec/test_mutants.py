"""The mistakes of quantisers that the vectors must notice: each can still be made, and the page lists what is found."""

from __future__ import annotations

import importlib

import pytest

from tools.vectors import mutants
from tools.vectors.encodings import KINDS
from tools.vectors.mistakes import MISTAKES, Mistake
from uqff.families.hqq import reference


def test_each_mistake_can_be_made() -> None:
    """Its passage stands in the source exactly once, and what replaces it compiles."""
    for mistake in MISTAKES:
        module = importlib.import_module(mistake.module)
        compile(mutants.mutated(mutants.source_of(module), mistake), mistake.module, "exec")


def test_there_are_mistakes_of_each_type() -> None:
    """Each of the 22, several."""
    for kind in KINDS:
        assert sum(kind in mistake.kinds for mistake in MISTAKES) >= 8, kind


def test_a_passage_that_is_gone_is_refused() -> None:
    """A reference that was changed does not make a mistake pass for one that was tried."""
    gone = Mistake("gone", ("q4_0",), "uqff.families.gguf.search", "no such line", "pass")
    with pytest.raises(ValueError, match="0 times 'no such line'"), mutants.made(gone):
        pytest.fail("made")


def test_the_page_lists_them() -> None:
    """In the order of the list."""
    rows = [line.split(" | ")[:2] for line in mutants.PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    assert rows[1:] == [[f"| {', '.join(mistake.kinds)}", mistake.text] for mistake in MISTAKES]


def test_some_are_noticed_and_undone() -> None:
    """One of each module; afterwards the reference is what it was."""
    first = {mistake.module: mistake for mistake in reversed(MISTAKES) if not mistake.equivalent}
    before = reference.quantize
    for result in mutants.run(first.values()):
        assert result.problem is None
    assert reference.quantize is before
    assert [
        each.vectors
        for each in mutants.run([Mistake("none", ("fp8",), reference.__name__, "BETA = 10.0", "BETA = 1e1")])
    ] == [{"fp8": ()}]
