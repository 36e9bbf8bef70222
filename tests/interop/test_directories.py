"""The live comparison of directories sees what it is there to see: no client is run here."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

import uqff
from tools.golden.v1 import TinyMixtral
from tools.interop.directories import CASES, Directory, compare_directories, make
from uqff.quantization.types import KINDS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    folder = tmp_path_factory.mktemp("made")
    TinyMixtral().write(folder)
    return make(folder, "afq4", "F32")


def test_the_recipe_of_a_case_is_followed(tmp_path: Path) -> None:
    """The directory that is compared with the client's has the types of the topology that the client is given."""
    TinyMixtral().write(tmp_path / "model")
    recipe = tmp_path / "topology.yml"
    recipe.write_text("'/k_proj/':\n  isq: q5_0\n")
    output = make(tmp_path / "model", "q8_0", "F32", recipe).report["outputs"][0]
    assert {each["module"]: each["stored"] for each in output["layer_details"] if each["stored"] != "q8_0"} == {
        "model.layers.0.self_attn.k_proj": "q5_0"
    }


def test_equal_directories(made: Directory) -> None:
    found = compare_directories(made, made)
    assert found == (10, len(made.layers) + len(made.residual), 0, 0, [])


@pytest.mark.parametrize("field", ["layers", "residual"])
def test_one_bit_of_a_file_is_seen(made: Directory, field: str) -> None:
    changed = bytearray(getattr(made, field))
    changed[-1] ^= 1
    found = compare_directories(Directory(**(made._asdict() | {field: bytes(changed)})), made)
    assert found.differing == 1
    (line,) = found.problems
    assert line.startswith(f"{field}: ")
    assert "1 of" in line


def with_header(file: bytes, old: bytes, new: bytes) -> bytes:
    end = 8 + int.from_bytes(file[:8], "little")
    header = file[8:end].replace(old, new)
    return len(header).to_bytes(8, "little") + header + file[end:]


def test_headers_are_compared(made: Directory) -> None:
    """Another name, another order, another version in the metadata; the producer's own name may differ."""
    renamed = with_header(made.layers, b"lm_head.bias", b"lm_head.bios") if b"lm_head.bias" in made.layers else b""
    renamed = renamed or with_header(made.layers, b"lm_head.weight.bits", b"lm_head.weight.bots")
    (problem,) = compare_directories(made._replace(layers=renamed), made).problems
    assert problem == "layers: headers differ: lm_head.weight.bits, lm_head.weight.bots"
    version = with_header(made.residual, b'"uqff.version":"1.2.0"', b'"uqff.version":"1.3.0"')
    (problem,) = compare_directories(made._replace(residual=version), made).problems
    assert problem.startswith("residual: __metadata__ is")
    producer = with_header(made.layers, b'"uqff.producer":"uqff"', b'"uqff.producer":"mistral.rs"')
    assert producer != made.layers
    assert compare_directories(made._replace(layers=producer), made).problems == []


def test_any_field_of_the_report_is_seen(made: Directory) -> None:
    report = copy.deepcopy(made.report)
    report["outputs"][0]["layer_details"][2]["resolved_target"] = "q4k"
    (problem,) = compare_directories(made._replace(report=report), made).problems
    assert problem.startswith("report: outputs is")
    other = json.loads(json.dumps(made.report)) | {"generated_by": {"tool": "another"}}
    assert compare_directories(made._replace(report=other), made).problems == []


def test_what_is_compared() -> None:
    """Experts of every type; every architecture."""
    assert sum(case.kinds == KINDS for case in CASES) == 2
    assert {case.architecture for case in CASES} >= {"mixtral", "Qwen3Moe", "Gemma2", "Phi3", "Mistral", "Qwen3"}


def test_what_the_package_refuses_is_raised(tmp_path: Path) -> None:
    TinyMixtral().write(tmp_path)
    with pytest.raises(uqff.UnsupportedError):
        make(tmp_path, "hqq4", "F32")
