"""`uqff verify`: what is printed and the three exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_files import GOLDEN, ROOT, unquant, write_file

from uqff.cli import main

SOUND = unquant([1.0, 2.0])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_a_clean_directory_is_0(options: tuple[str, ...]) -> None:
    """One line, nothing on the standard error."""
    result = run(str(GOLDEN / "llama-mixed-f32"), *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "clean: no violation in 15 layers, 175,532 bytes of blobs\n"


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
        "3 violations in 2 layers, 64 bytes of blobs\n"
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
    assert result.stdout == f"{path}: offset 0: not a UQFF file: a GGUF file\n1 violation\n"


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
