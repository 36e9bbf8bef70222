"""`uqff verify`: what is printed and the three exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.samples import entry, framed, write
from tests.support.samples_v1 import LAYERS, byte, version
from tests.support.samples_v1 import layer as entries_of_layer
from tests.support.samples_v1 import write as write_entries
from tests.support.tiny_files import GOLDEN, ROOT, unquant, write_file
from uqff.cli import main

SOUND = unquant([1.0, 2.0])


UNQUANT_F32 = (
    "unquant layers in F32: they run with activations in F32 only, and auto takes F16 on a CPU and BF16 on a GPU"
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_a_clean_directory_is_0(options: tuple[str, ...]) -> None:
    """A line, before it what is worth knowing, nothing on the standard error."""
    result = run(str(GOLDEN / "llama-mixed-f32"), *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (f"note: 7 {UNQUANT_F32}\nclean: no violation in 15 layers, 175,532 bytes of layers\n")


def test_violations_are_1(tmp_path: Path) -> None:
    """A line each with file, layer, field, offset, expected and got, and their number."""
    path = write_file(tmp_path / "m.uqff", {"0": SOUND[:5] + b"\2" + SOUND[6:], "2": unquant([float("inf")])})
    result = run(str(path))
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout == (
        f"{path}: layer 2, offset 290: gap in the layer indices: expected layer 1, got layer 2\n"
        f"{path}: layer 0, field bias_flag, offset 261: value out of range: expected 0 or 1, got 2\n"
        f"{path}: layer 2, field weight.data, offset 316: 1 element breaks a rule: "
        "expected a finite number, got element 0\n"
        f"note: 1 {UNQUANT_F32}\n"
        "3 violations in 2 layers, 64 bytes of layers\n"
    )


def test_deep_finds_more(tmp_path: Path) -> None:
    """Sound as stored, infinite as numbers."""
    blob = (ROOT / "spec" / "vectors" / "mxfp4" / "edge-scales.bin").read_bytes()
    path = write_file(tmp_path / "m.uqff", {"0": blob})
    assert run(str(path)).exit_code == 0
    result = run(str(path), "--deep")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == (
        f"{path}: layer 0: weight dequantises to numbers that are not finite: "
        "expected 160 finite numbers, got 16 that are not, the first is element 129: -inf"
    )


def test_a_container_that_does_not_open_is_one_violation(tmp_path: Path) -> None:
    """Named as what it is."""
    path = tmp_path / "m.uqff"
    path.write_bytes(b"GGUF" + bytes(20))
    result = run(str(path))
    assert (result.exit_code, result.stderr) == (1, "")
    told = "not a UQFF file: a GGUF file, which uqff inspect, plan, convert, quantize and run take"
    assert result.stdout == f"{path}: offset 0: {told}\n1 violation\n"


def test_an_empty_directory_is_1(tmp_path: Path) -> None:
    """There is something, and it is not UQFF."""
    assert run(str(tmp_path)).stdout == f"{tmp_path}: no .uqff file in the directory\n1 violation\n"
    assert run(str(tmp_path)).exit_code == 1


def test_names_are_escaped(tmp_path: Path) -> None:
    """A key with a terminal's colour code."""
    path = write_file(tmp_path / "m.uqff", {"\x1b[31m": b"x"})
    assert run(str(path)).stdout == (
        f"{path}: field header.\\x1b[31m, offset 8: key is not a layer index: "
        "expected a decimal number, got \\x1b[31m\n1 violation\n"
    )


def test_a_missing_file_is_2(tmp_path: Path) -> None:
    """As any wrong call."""
    result = run(str(tmp_path / "none.uqff"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "does not exist" in result.stderr


def test_every_type_of_a_directory(tmp_path: Path) -> None:
    """A published model has several files: all are checked, and counted together."""
    for name, blob in (("a-0", SOUND), ("b-0", SOUND), ("b-1", SOUND[:-1])):
        write_file(tmp_path / f"{name}.uqff", {name[-1]: blob})
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0].startswith(f"{tmp_path / 'b-1.uqff'}: layer 1, field weight.data")
    assert result.stdout.splitlines()[-1:] == [f"1 violation in 3 layers, {3 * len(SOUND) - 1} bytes of layers"]


def test_json(tmp_path: Path) -> None:
    """Every part of a violation by itself; an empty list is a clean file."""
    path = write_file(tmp_path / "m.uqff", {"0": SOUND[:5] + b"\2" + SOUND[6:]})
    result = run(str(path), "--json")
    assert result.exit_code == 1
    violation = {"problem": "value out of range", "file": str(path), "layer": "0", "field": "bias_flag", "offset": 261}
    assert json.loads(result.stdout) == {
        "schema": 1,
        "layers": 1,
        "bytes": len(SOUND),
        "violations": [violation | {"expected": "0 or 1", "got": "2", "rule": "BLOB-07"}],
        "notes": [],
    }
    write_file(tmp_path / "m.uqff", {"0": SOUND})
    result = run(str(path), "--json")
    assert (result.exit_code, json.loads(result.stdout)["violations"]) == (0, [])


def test_the_model_of_the_configuration_has_to_be_there(tmp_path: Path) -> None:
    """A loader counts layers, and looks for what is no layer in the residual; an unknown architecture tells nothing."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    path = write(tmp_path / "m.uqff", {str(index): SOUND for index in range(8)})
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == (
        f"{path}: the model lacks a weight: expected all weights of its configuration as layers, or in "
        "residual.safetensors beside them, got none for model.embed_tokens"
    )
    residual = framed({"model.embed_tokens.weight": entry(4, dtype="F32", shape=[1])}, bytes(4))
    (tmp_path / "residual.safetensors").write_bytes(residual)
    assert run(str(tmp_path)).exit_code == 0
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "expected 15 layers, got 8, without 8 (model.layers.1.self_attn.q_proj), 9 (" in run(str(tmp_path)).stdout
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    assert run(str(tmp_path)).exit_code == 0
    (tmp_path / "config.json").write_text("[")
    assert "config.json: not JSON" in run(str(tmp_path)).stdout


def test_strict(tmp_path: Path) -> None:
    """What readers of 1.x do without: producer, report, and the type that was asked for."""
    path = write_entries(tmp_path / "m.uqff", version(), entries_of_layer("a", LAYERS["gguf"]))
    assert run(str(path)).exit_code == 0
    assert [line.partition(": ")[2] for line in run(str(path), "--strict").stdout.splitlines()[:2]] == [
        "field uqff.producer: producer is not named: expected a text in the metadata",
        "report is missing: expected a report, got no such file",
    ]
    golden = GOLDEN.parent / "v1" / "1.2.0" / "qwen2-40-f16"
    shutil.copy(golden / "q4_0-0.uqff", tmp_path)
    shutil.copy(golden / "q4_0.uqff_report.json", tmp_path / "uqff_report.json")
    assert run(str(tmp_path / "q4_0-0.uqff")).exit_code == 0
    lines = run(str(tmp_path / "q4_0-0.uqff"), "--strict").stdout.splitlines()
    assert "layer lm_head: layer is stored plain: expected q6k, got f32" in lines[0]
    assert lines[-1].startswith("9 violations in 9 layers")


def test_deep_looks_at_every_expert(tmp_path: Path) -> None:
    """A stack is dequantised expert by expert; elements are counted through all of them."""
    scales = ("U8", (2, 2, 1), b"\x7f\x7f\x7f\xff")
    stack = {"weight.format": byte(6), "weight": ("U8", (2, 2, 16), b"\x11" * 64), "weight.scales": scales}
    path = write_entries(tmp_path / "m.uqff", version(), entries_of_layer("a", stack))
    lines = run(str(path), "--deep").stdout.splitlines()
    assert lines[-2].endswith("expected 128 finite numbers, got 32 that are not, the first is element 96: inf")
