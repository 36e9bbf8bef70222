"""What `make interop-few` leaves out: nothing of which there is no other row. No client runs here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools.interop import architectures, entries, llamacpp, migration, quantisers, reading, running
from tools.interop.cases import CASES
from tools.interop.few import few_of_each
from tools.interop.gguf import Case
from tools.interop.install import MISTRALRS, ROOT, TRANSFORMERS


def test_every_model_and_every_type_has_its_turn() -> None:
    rows = [(model, kind) for model in "abcd" for kind in range(6)]
    few = few_of_each(rows, lambda row: row[0], 3)
    assert few == [("a", 0), ("a", 3), ("b", 2), ("b", 5), ("c", 1), ("c", 4), ("d", 0), ("d", 3)]


def test_of_a_model_with_few_rows_none_is_left_out() -> None:
    rows = [("a", 0), ("b", 0), ("b", 1), ("b", 2)]
    assert few_of_each(rows, lambda row: row[0], 3) == [("a", 0), ("b", 2)]


def test_runs() -> None:
    """All models; all types but three, of which quantisers and entries have rows."""
    whole, few = running.all_jobs(), running.all_jobs(few=True)
    assert {model for model, _ in few} == {model for model, _ in whole}
    assert {kind for _, kind in few} == {kind for _, kind in whole} - {"mxfp4", "q4_0", "hqq8"}


@pytest.mark.parametrize("table", [reading, entries, architectures])
def test_tables_of_models_and_types(table: object) -> None:
    """Files, entries and architectures: all models, all types."""
    whole = table.all_jobs()  # type: ignore[attr-defined]
    few = table.all_jobs(few=True)  # type: ignore[attr-defined]
    assert set(few) < set(whole)
    assert {model for model, _ in few} == {model for model, _ in whole}
    assert {kind for _, kind in few} == {kind for _, kind in whole}


def test_migration() -> None:
    """All models; a type of every family; both ways of experts; every type that goes down."""
    whole, few = migration.all_jobs(), migration.all_jobs(few=True)
    assert {case.name for case, _ in few} == {case.name for case, _ in whole}
    families = ("q4_", "q8_", "q4k", "hqq", "fp8", "afq", "f8q8", "mxfp4", "mixed")
    assert all(any(kind.startswith(family) for _, kind in few) for family in families)
    assert {kind in case.plain for case, kind in few if case.plain} == {True, False}
    assert {kind for case, kind in few if kind in migration.DOWN and kind not in case.plain} == {*migration.DOWN}


def test_llamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """All architectures, all types; models need not be made for that."""
    monkeypatch.setattr(llamacpp, "other", lambda name, kind: Case(name, name, {}, {}, kind))
    monkeypatch.setattr(llamacpp, "cases", lambda: [Case(name, name, {}, {}, "f32") for name in "abcdefgh"])
    whole, few = llamacpp.all_jobs(), llamacpp.all_jobs(few=True)
    assert {case.name for case, _ in few} == {case.name for case, _ in whole}
    assert {kind for _, kind in few} == set(llamacpp.KINDS)


def test_the_clients_that_are_installed_are_those_that_are_asked() -> None:
    assert tuple(quantisers.GENERATIONS) == MISTRALRS
    assert TRANSFORMERS["5"] in (ROOT / "constraints.txt").read_text()


def test_quantisers() -> None:
    """Of either client every checkpoint, and every type of several; all directories, and every recipe of some."""
    whole, few = (quantisers.all_jobs(quantisers.GENERATIONS, CASES, (), Path("x"), few=some) for some in (False, True))
    assert len(few) < len(whole) / 4
    assert {(job.version, *job.checkpoints) for job in few} == {(job.version, *job.checkpoints) for job in whole}
    counts = Counter((job.version, job.kind) for job in few if job.case is not None)
    wanted = {(job.version, job.kind) for job in whole if job.case is not None}
    assert counts.keys() == wanted
    assert min(counts.values()) >= 3
    patterns = [{job.name.rpartition(", ")[2] for job in jobs if job.recipe} for jobs in (few, whole)]
    assert patterns[0] == patterns[1]
