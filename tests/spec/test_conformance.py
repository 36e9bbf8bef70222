"""The runner for other implementations, the index that it goes by, and the reader in C."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.vectors import c_reader, conformance, index

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
CASES = {case["id"]: case for case in conformance.read_index(VECTORS)}


def outcome_of(tmp_path: Path, name: str, report: object) -> str | None:
    """What the runner says to a report on one vector."""
    (tmp_path / index.INDEX).write_text(json.dumps([CASES[name]]), "utf-8")
    for path in (*CASES[name]["files"], CASES[name].get("description", "")):
        if path:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes((VECTORS / path).read_bytes())
    script = tmp_path / "reader.py"
    script.write_text(f"print({json.dumps(report)!r})", "utf-8")
    (outcome,) = conformance.run_all(f"{sys.executable} {script} {{file}}", tmp_path)
    return outcome.problem


def right_report(name: str) -> dict[str, Any]:
    """A blob's vector as a reader must report it."""
    described = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    layer = {key: described[key] for key in ("kind", "shape", "bias")} | {"float32": described["float32"]["hex"]}
    return {"outcome": "accept", "layers": [layer]}


def test_a_right_report_passes(tmp_path: Path) -> None:
    """The runner asks for nothing that the protocol does not say."""
    assert outcome_of(tmp_path, "gguf/q4_0-bias-f32", right_report("gguf/q4_0-bias-f32")) is None
    assert outcome_of(tmp_path, "bad/empty", {"outcome": "refuse"}) is None


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("kind", "q4_1", "kind q4_1 instead of q4_0"),
        ("shape", [32, 3], "shape (32, 3) instead of (3, 32)"),
        ("float32", "00" * 384, "weights"),
        ("bias", None, "bias None instead of"),
        ("key", "lm_head", "layers ['lm_head']"),
    ],
)
def test_a_wrong_report_is_found(tmp_path: Path, field: str, value: object, problem: str) -> None:
    """Each thing that a reader can get wrong."""
    report = right_report("gguf/q4_0-bias-f32")
    report["layers"][0][field] = value
    assert problem in (outcome_of(tmp_path, "gguf/q4_0-bias-f32", report) or "")


def test_taking_what_is_broken_is_found(tmp_path: Path) -> None:
    """The other way round as well."""
    assert outcome_of(tmp_path, "bad/empty", {"outcome": "accept", "layers": []}) == "accept instead of refuse"
    assert outcome_of(tmp_path, "gguf/q4_0", {"outcome": "refuse"}) == "refuse instead of accept"


def test_a_program_that_fails_is_no_reader(tmp_path: Path) -> None:
    """A crash is no refusal."""
    (tmp_path / index.INDEX).write_text(json.dumps([CASES["bad/empty"]]), "utf-8")
    (outcome,) = conformance.run_all(f"{sys.executable} -c exit(3)", tmp_path)
    assert outcome.problem is not None
    assert "exit status 3" in outcome.problem


def test_every_vector_is_in_the_index() -> None:
    """A vector that no case names would never be tried; the ids are unique."""
    listed = {path for case in CASES.values() for path in case["files"]}
    present = {path.relative_to(VECTORS).as_posix() for path in VECTORS.rglob("*") if path.suffix in (".bin", ".uqff")}
    assert listed == present
    assert len(CASES) == len(conformance.read_index(VECTORS))
    allowed = index.case_schema()["items"]["properties"]
    assert {key for case in CASES.values() for key in case} <= allowed.keys()


def test_the_report_counts_rules() -> None:
    """By letters and one by one: vectors, how many were refused, and with the vector's own rule."""
    case = CASES["bad/afq-bits-5"]
    outcomes = [
        conformance.Outcome(case, None, "AFQ-01"),
        conformance.Outcome(case, None, "AFQ-02"),
        conformance.Outcome(case, "accept instead of refuse"),
        conformance.Outcome(CASES["bad/empty"], None),
        conformance.Outcome(CASES["gguf/q4_0"], None),
    ]
    assert conformance.by_rule(outcomes) == [("AFQ-01", 3, 2, 1), (CASES["bad/empty"]["rule"], 1, 1, 0)]
    assert conformance.by_rule(outcomes, letters=True)[0] == ("AFQ", 3, 2, 1)
    assert "AFQ-01: 2 of 3 refused, 1 with the id of the rule" in conformance.lines_of(outcomes, every_rule=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader in C, compiled without a warning."""
    return c_reader.compile_reader(tmp_path_factory.mktemp("c") / "uqff-read", c_reader.FLAGS)


OTHER_RULES = {"bad/header-deeply-nested": "FILE-10", "bad/uqff-1-version": "ENT-11"}
"""Vectors that break two rules, of which the reader in C names the other one."""


@pytest.mark.skipif(c_reader.compiler() is None, reason="no C compiler")
def test_the_reader_in_c_names_the_rules(program: Path) -> None:
    """Of every broken vector."""
    cases = [case for case in CASES.values() if case["outcome"] == index.REFUSE]
    lines = "".join("\t".join(str(VECTORS / path) for path in case["files"]) + "\n" for case in cases)
    done = subprocess.run([program, "-"], input=lines, capture_output=True, text=True, check=True)
    named = [json.loads(line)["rule"] for line in done.stdout.splitlines()]
    assert named == [OTHER_RULES.get(case["id"], case["rule"]) for case in cases]


@pytest.mark.skipif(c_reader.compiler() is None, reason="no C compiler")
def test_the_reader_in_c(program: Path) -> None:
    """It finds what the spec says, and refuses; `make interop` tries all vectors."""
    names = ["gguf/q4_0-bias-f32", "hqq/hqq3-axis1", "afq/afq3-g32", "entries/worked-example", "bad/afq-bits-5"]
    for name in names:
        case = CASES[name]
        files = [str(VECTORS / path) for path in case["files"]]
        done = subprocess.run([program, *files], capture_output=True, text=True, check=False)
        assert json.loads(done.stdout)["outcome"] == case["outcome"], name
        assert done.returncode == (case["outcome"] == "refuse"), name
