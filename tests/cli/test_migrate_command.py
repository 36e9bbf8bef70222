"""``uqff migrate``: what it prints, refuses, and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import uqff
from tests.support.golden_models import GOLDEN
from tests.support.small_models import SmallModel, config_of, write_v0
from uqff.cli import main
from uqff.migration import parse_names
from uqff.models.architectures import layer_names

MIXED = GOLDEN / "v0" / "llama-mixed-f32"


UNQUANT_F32 = "7 unquant layers in F32: they run with activations in F32 only, and auto takes BF16 on a GPU"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["migrate", *map(str, arguments)])


def test_the_summary(tmp_path: Path) -> None:
    result = run(MIXED, tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == [str(tmp_path / "out"), "  version  1.2.0", "  q8_0     1 shard"]
    assert lines[-1].split(None, 1) == [
        "copied",
        "config.json, generation_config.json, tokenizer.json, tokenizer_config.json",
    ]
    assert result.stderr == f"uqff: q8_0: {UNQUANT_F32}\n"
    assert uqff.open(tmp_path / "out").version == (1, 2, 0)


def test_quiet_and_json(tmp_path: Path) -> None:
    """The mapping is in the document, and what became of every file."""
    quiet = run(MIXED, tmp_path / "quiet", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", f"uqff: q8_0: {UNQUANT_F32}\n")
    result = run(MIXED, tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert document["uqff_version"] == "1.2.0"
    assert document["not_copied"] == []
    (model,) = document["models"]
    assert (model["stem"], model["from"], model["shards"]) == ("q8_0", "0.1.3", ["q8_0-0.uqff"])
    assert model["layers"][1] == {
        "index": 1,
        "key": "model.layers.0.self_attn.q_proj",
        "expert": None,
        "stored": "afq4",
        "shape": [64, 64],
        "bytes": 2628,
    }


def test_a_dry_run_prints_the_mapping_and_writes_nothing(tmp_path: Path) -> None:
    """Its first two columns are a file of names, experts included."""
    model = SmallModel(config_of("Mixtral"), {}, False, 1)
    write_v0(model, tmp_path / "old")
    result = run(tmp_path / "old", "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["index", "key", "type", "shape", "bytes"]
    rows = [line.split() for line in lines[2:]]
    assert rows[7][:3] == ["7", "model.layers.0.block_sparse_moe.experts.down_proj[0]", "q8_0"]
    names = parse_names("\n".join(f"{row[0]} {row[1]}" for row in rows))
    assert [(n.key, n.expert) for n in names] == [(n.key, n.expert) for n in layer_names(model.config)]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_expressed_is_listed(tmp_path: Path) -> None:
    """A line each, and exit code 1, in a dry run and without."""
    model = SmallModel(config_of("Mixtral"), {}, False, 1)
    fp8 = SmallModel(model.config, {name.key: "fp8" for name in layer_names(model.config)}, False, 1)
    write_v0(fp8, tmp_path / "old")
    for arguments in ((tmp_path / "old", "--dry-run"), (tmp_path / "old", tmp_path / "new")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.count("stacked FP8 weights no longer exist") >= 6
    assert result.stderr.splitlines()[-1].startswith("uqff: 6 layers cannot be expressed in 1.2.0: ")
    assert run(tmp_path / "old", tmp_path / "new", "--plain-experts").exit_code == 0


def test_names_from_a_file(tmp_path: Path) -> None:
    model = SmallModel(config_of("Llama"), {}, False, 1)
    write_v0(model, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    result = run(tmp_path / "old", tmp_path / "new")
    assert result.exit_code == 1
    assert "or a file of names" in result.stderr
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name.index} {name.module}\n" for name in layer_names(model.config)))
    assert run(tmp_path / "old", tmp_path / "new", "--names", names).exit_code == 0
    names.write_text("0 lm_head\n")
    result = run(tmp_path / "old", tmp_path / "no", "--names", names)
    assert result.exit_code == 1
    assert "the names are of another file: expected 1 layers, got 15" in result.stderr


@pytest.mark.parametrize("option", [["--fix-biases"], ["--fix-biases", "bf16"]])
def test_warnings_go_to_stderr_and_biases_are_changed(tmp_path: Path, option: list[str]) -> None:
    """The option may stand alone."""
    source = GOLDEN / "v0" / "qwen2-bf16" / "fp8-0.uqff"
    result = run(source, tmp_path / "as-is", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == (
        "uqff: fp8: 3 biases of FP8 layers in F8_E4M3, not for activations in BF16; --fix-biases changes them\n"
        "uqff: fp8: 3 biases of FP8 layers in F8E4M3: no release can add them: it loads the model and then fails\n"
    )
    result = run(source, tmp_path / "fixed", *option)
    assert "changed for activations in BF16" in result.stderr
    with uqff.open(tmp_path / "fixed") as file:
        assert {str(layer.bias.dtype) for layer in file.values() if layer.bias is not None} == {"torch.bfloat16"}


def test_calls_that_are_not_right(tmp_path: Path) -> None:
    assert run(MIXED).exit_code == 2
    assert "Missing argument 'OUT'" in run(MIXED).stderr
    assert run(MIXED, tmp_path / "out", "--to", "2.0").exit_code == 2
    assert run(tmp_path / "nowhere", tmp_path / "out").exit_code == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    result = run(MIXED, tmp_path / "out", "--force")
    assert result.exit_code == 2
    assert "not a UQFF model" in result.stderr


def test_force_replaces_a_model(tmp_path: Path) -> None:
    assert run(MIXED, tmp_path / "out").exit_code == 0
    assert run(MIXED, tmp_path / "out", "--to", "1.1").exit_code == 2
    assert run(MIXED, tmp_path / "out", "--to", "1.1", "--force").exit_code == 0
    assert uqff.open(tmp_path / "out").version == (1, 1, 0)
