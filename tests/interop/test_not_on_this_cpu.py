"""Clients that die of an instruction which this CPU lacks: counted, proven from golden files, never unnoticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.golden import v0 as golden
from tools.interop import client as clients
from tools.interop import golden as interop_golden
from tools.interop.cases import CASES
from tools.interop.client import WRITTEN, Client, IllegalInstruction, NotOnThisCPU, missing_features
from tools.interop.quantisers import Row, Written, check, total
from tools.interop.reading import KINDS, MIXED, Outcome, Result, run_client

ZEN3 = "avx2 fma vaes vpclmulqdq"
ZEN4 = f"{ZEN3} avx512f avx512_vnni gfni"
SAPPHIRE_RAPIDS = f"{ZEN4} avx_vnni"


@pytest.mark.parametrize(
    ("flags", "expected"), [(ZEN3, ["avx_vnni", "gfni"]), (ZEN4, ["avx_vnni"]), (SAPPHIRE_RAPIDS, [])]
)
def test_what_a_cpu_lacks_is_read_off_its_flags(tmp_path: Path, flags: str, expected: list[str]) -> None:
    """`avx512_vnni` is not `avx_vnni`; of 0.9.5 nothing is known to be taken for granted."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: gfni avx_vnni\nflags\t\t: fpu {flags} xsave\nbugs\t\t: gfni\n")
    assert missing_features("0.6.0", cpuinfo) == expected
    assert missing_features("0.9.5", cpuinfo) == []


def test_a_system_that_does_not_say_excuses_nothing(tmp_path: Path) -> None:
    """Where flags cannot be read, SIGILL is a failure."""
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert missing_features("0.6.0", tmp_path / "arm") == []
    assert missing_features("0.6.0", tmp_path / "absent") == []


def dying(folder: Path, version: str = "0.6.0", says: str = "") -> Client:
    """A client of some version that dies of SIGILL, but for telling its version; it may have said something."""
    script = folder / "python"
    about = f"""case "$2" in *about*) echo 'uqff-client-result:{{"version": "{version}"}}'; exit;; esac"""
    script.write_text(f"#!/bin/sh\n{about}\necho '{says}'\nkill -ILL $$\n")
    script.chmod(0o755)
    return Client(script)


def lacking(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """A CPU without what 0.6.0 takes for granted."""
    monkeypatch.setattr(clients, "missing_features", lambda version: list(features) if version == "0.6.0" else [])


def test_dying_on_a_cpu_without_the_features_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names what is missing; the outcome is no answer, and not that of a file."""
    lacking(monkeypatch, "avx_vnni", "gfni")
    outcome = run_client(dying(tmp_path), [tmp_path / "0-0.uqff"], "llama")
    assert outcome == Outcome(None, "not run on this CPU, which lacks avx_vnni, gfni", loaded=False, not_run=True)


@pytest.mark.parametrize(("version", "features"), [("0.6.0", ()), ("0.9.5", ("gfni",))])
def test_dying_elsewhere_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, features: tuple[str, ...]
) -> None:
    """On a CPU that has everything, or of another client: no outcome of a file, nor excused by having written."""
    lacking(monkeypatch, *features)
    client = dying(tmp_path, version, WRITTEN)
    with pytest.raises(IllegalInstruction, match="died of SIGILL, on a CPU that should do"):
        run_client(client, [tmp_path / "0-0.uqff"], "llama")
    (tmp_path / "q4k-0.uqff").touch()
    with pytest.raises(IllegalInstruction):
        client.write(tmp_path, tmp_path / "q4k.uqff", architecture="llama", dtype="F32", isq="q4k")


def test_a_file_that_was_written_before_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dying in the dummy run after that is no failure on such a CPU; dying before is not run."""
    lacking(monkeypatch, "avx_vnni")
    script = dying(tmp_path, says=WRITTEN).python
    written, output = tmp_path / "q5_1-0.uqff", tmp_path / "q5_1.uqff"
    script.write_text(script.read_text().replace("kill", f"touch {written}\nkill"))
    client = Client(script)
    assert client.write(tmp_path, output, architecture="llama", dtype="F32", isq="q5_1") == written
    script.write_text(script.read_text().replace(WRITTEN, "quantising"))
    with pytest.raises(NotOnThisCPU, match=r"^not run on this CPU, which lacks avx_vnni"):
        client.write(tmp_path, output, architecture="llama", dtype="F32", isq="q5_1")


def test_rows_that_were_not_run_are_told_apart() -> None:
    """Neither equal by accident nor refused: a file that ran must not pass for one that could not."""
    idle, ran = Outcome(None, "lacks", loaded=True, not_run=True), Outcome(None, "ValueError", loaded=True)
    assert Result("llama", "q4k", "re-saved", [], None, idle, idle).not_run
    assert not Result("llama", "q4k", "re-saved", [], True, idle, ran).equal
    assert not Result("llama", "q4k", "re-saved", [], True, ran, ran).not_run
    row = check("0.6.0", CASES[0], "q4k", Written({}, not_run="lacks gfni"))
    assert row == Row("0.6.0", CASES[0].name, "q4k", "kernels", not_run="lacks gfni")
    assert row.equal
    assert total("0.6.0", [row, Row("0.6.0", "llama", "q8_0", "kernels", layers=3)])[-1] == "1 not run"


@pytest.mark.parametrize("kind", [*KINDS, MIXED])
def test_golden_files_stand_for_every_type(kind: str) -> None:
    """Of each type that 0.6.0 writes there is a golden file, and the package makes its bytes."""
    proof = interop_golden.prove(kind, {"files": 2})
    assert proof.problems == ()
    assert proof.files >= 2
    assert proof.layers >= 8 * proof.files


def test_a_golden_file_that_differs_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one block; and a type that has no golden file."""
    case = next(case for case in golden.CASES if case.name == "llama-edge-256-f32")
    shutil.copytree(golden.GOLDEN / "v0" / case.name, tmp_path / "v0" / case.name)
    monkeypatch.setattr(golden, "GOLDEN", tmp_path)
    monkeypatch.setattr(golden, "CASES", (case,))
    assert interop_golden.prove("q3k", {}).problems == ()
    path = tmp_path / "v0" / case.name / "q3k-0.uqff"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    (problem,) = interop_golden.prove("q3k", {}).problems
    assert "1 of" in problem
    assert interop_golden.prove("hqq4", {}).problems == ("there is no golden file of it",)


def test_proofs_count_the_rows_of_each_table() -> None:
    """In the order in which they came."""
    (first, second) = interop_golden.prove_all(
        [("files", "q2k"), ("files", "q2k"), ("running", "q2k"), ("files", "q3k")]
    )
    assert (first.kind, first.rows, second.kind, second.rows) == (
        "q2k",
        {"files": 2, "running": 1},
        "q3k",
        {"files": 1},
    )
