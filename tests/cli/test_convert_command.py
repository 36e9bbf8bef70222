"""`uqff convert`: what it prints, refuses, and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import uqff
from tools.tiny.gguf import write_gguf
from tools.tiny.models import TinyModel
from uqff.cli import main
from uqff.cli.render import size

MODEL = TinyModel(hidden_size=256, intermediate_size=64, kv_heads=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_gguf(MODEL, tmp_path / "model.gguf", "q4_0", kinds={"lm_head": "q6k"})
    return tmp_path / "model.gguf"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    """What was made on the standard output, what there is to know of it on the other."""
    out, back = tmp_path / "out", tmp_path / "back.gguf"
    result = run(source, out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        str(out),
        "  format   UQFF 1.2.0",
        f"  weights  q4_0-0.uqff, {size((out / 'q4_0-0.uqff').stat().st_size)}",
        "  types    8 q4_0, 1 q6k",
        "  beside   residual.safetensors, config.json, generation_config.json, metadata.gguf, uqff_report.json",
    ]
    assert result.stderr.splitlines() == [
        "uqff: note: no tokenizer.json: tokenizers of type none are not known here; give the model's own (--assets)",
        "uqff: note: a GGUF file does not tell Llama from Mistral: taken as LlamaForCausalLM",
    ]
    result = run(out, back)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        str(back),
        "  format   GGUF 3",
        f"  weights  back.gguf, {size(back.stat().st_size)}",
        "  types    8 q4_0, 3 f32, 1 q6k",
        "  beside   -",
    ]
    assert result.stderr == "uqff: note: no tokenizer in the GGUF file: there is no tokenizer.json\n"


def test_json_and_quiet(source: Path, tmp_path: Path) -> None:
    MODEL.write(tmp_path / "own")
    result = run(source, tmp_path / "out", "--json", "--assets", tmp_path / "own", "--format", "0.2", "--to", "uqff")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == {
        "path": str(tmp_path / "out"),
        "format": "UQFF 0.2.0",
        "files": ["q4_0-0.uqff"],
        "bytes": (tmp_path / "out" / "q4_0-0.uqff").stat().st_size,
        "types": {"q4_0": 7, "q6k": 1},
        "written": [
            "residual.safetensors",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "metadata.gguf",
        ],
        "notes": ["the embedding is dequantised: 0.x has no quantised one (it was Q4_0)"],
        "limits": [],
    }
    result = run(source, tmp_path / "quiet", "--quiet", "--assets", tmp_path / "own")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    with uqff.open(tmp_path / "quiet") as file:
        assert file.version == (1, 2, 0)


def test_a_target_that_is_there(source: Path, tmp_path: Path) -> None:
    """It stays unless --force is given; what is no model stays in any case."""
    out, back = tmp_path / "out", tmp_path / "back.gguf"
    assert run(source, out).exit_code == 0
    assert run(out, back).exit_code == 0
    for arguments in ((source, out), (out, back)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "exists" in result.stderr
        assert run(*arguments, "--force").exit_code == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").touch()
    assert run(source, tmp_path / "notes", "--force").exit_code == 2


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    """Exit code 1, a line that says why, nothing written."""
    MODEL.write(tmp_path / "own")
    weights = {name: uqff.quantize(torch.zeros(64, 64), "afq4") for name in ("lm_head",)}
    uqff.save(weights, tmp_path / "own" / "a.uqff", version=(1, 2, 0))
    for arguments, words in (
        ((source, tmp_path / "x", "--to", "gguf"), "is GGUF already"),
        ((tmp_path / "own" / "a.uqff", tmp_path / "x"), "not the layers of the configuration"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert result.stderr.startswith("uqff: ")
        assert not (tmp_path / "x").exists()
    assert run(tmp_path / "absent.gguf", tmp_path / "x").exit_code == 2
