"""`uqff quantize`: what it prints, refuses, and leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import uqff
from tools.tiny.models import TinyModel
from uqff.cli import main
from uqff.cli.render import size


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A llama checkpoint whose down_proj is 64 wide: no K type fits it."""
    TinyModel(hidden_size=256, intermediate_size=64).write(tmp_path / "source")
    return tmp_path / "source"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def test_the_tables(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, out, "--isq", "Q4K", "--isq", "8", "--format", "0.1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    sizes = {name: size((out / name).stat().st_size) for name in os.listdir(out)}
    assert lines[:6] == [
        str(out),
        "  version     0.1.3",
        "  load dtype  F32",
        f"  residual    4 tensors, {sizes['residual.safetensors']}",
        f"  q4k         1 shard, {sizes['q4k-0.uqff']}",
        f"  q8_0        1 shard, {sizes['q8_0-0.uqff']}",
    ]
    assert re.split(r"\s{2,}", lines[7]) == [
        "isq",
        "stored",
        "layers",
        "bytes",
        "bits/weight",
        "rel. RMS error",
        "worst layers",
    ]
    rows = [re.split(r"\s+", line, maxsplit=6) for line in lines[8:]]
    assert [row[:3] for row in rows] == [["q4k", "q4k", "7"], ["q4k", "q4_1", "1"], ["q8_0", "q8_0", "8"]]
    file = uqff.open(out / "q4k-0.uqff")
    assert int(rows[1][3].replace(",", "")) == len(file.blob(7))
    assert rows[1][4] == f"{8 * len(file.blob(7)) / (256 * 64):.3f}"
    assert rows[1][6].startswith("model.layers.0.mlp.down_proj 0.07")
    assert result.stderr == (
        "uqff: fallback: model.layers.0.mlp.down_proj: q4k -> q4_1, shape [256, 64]: "
        "the last dimension is not a multiple of 256\n"
    )


def test_promotions_are_shown_and_are_no_fallbacks(source: Path, tmp_path: Path) -> None:
    """In 1.2, the default; a line of their own, a row by the type they have, nothing on stderr."""
    result = run(source, tmp_path / "out", "--isq", "q5_0", "--shard-size", "100 KB")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["version", "1.2.0"]
    assert lines[4].startswith("  q5_0           2 shards, ")
    assert lines[5] == "  q5_0 promoted  lm_head q8_0, model.embed_tokens q8_0"
    assert [line.split()[:3] for line in lines[8:]] == [["q5_0", "q8_0", "2"], ["q5_0", "q5_0", "7"]]
    result = run(source, tmp_path / "plain", "--isq", "q5_0", "--no-promote")
    assert "promoted" not in result.stdout
    assert [line.split()[:3] for line in result.stdout.splitlines()[7:]] == [["q5_0", "q5_0", "9"]]
    document = json.loads(run(source, tmp_path / "json", "--isq", "q5_0", "--json").stdout)
    assert document["outputs"][0]["promoted"] == [
        {"module": module, "from": "q5_0", "to": "q8_0"} for module in ("lm_head", "model.embed_tokens")
    ]


def test_quiet_is_not_silent_about_fallbacks(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "a", "--isq", "q8_0", "--quiet").output == ""
    result = run(source, tmp_path / "b", "--isq", "q4k", "--quiet")
    assert result.stdout == ""
    assert result.stderr.startswith("uqff: fallback: model.layers.0.mlp.down_proj: q4k -> q4_1")


def test_json(source: Path, tmp_path: Path) -> None:
    result = run(
        source, tmp_path / "out", "--isq", "q4k", "--dtype", "bf16", "--engine", "0.8", "--format", "0.2", "--json"
    )
    document = json.loads(result.stdout)
    assert document["path"] == str(tmp_path / "out")
    assert (document["uqff_version"], document["dtype"]) == ("0.2.0", "BF16")
    assert document["residual"] == {
        "tensors": 4,
        "bytes": (tmp_path / "out" / "residual.safetensors").stat().st_size,
    }
    (output,) = document["outputs"]
    assert (output["quant"], output["shards"], output["layers"]) == ("q4k", ["q4k-0.uqff"], 8)
    assert output["bytes"] == (tmp_path / "out" / "q4k-0.uqff").stat().st_size
    assert [(row["stored"], row["layers"]) for row in output["types"]] == [("q4k", 7), ("q4_1", 1)]
    assert output["fallbacks"] == [
        {
            "module": "model.layers.0.mlp.down_proj",
            "from": "q4k",
            "to": "q4_1",
            "shape": [256, 64],
            "reason": "the last dimension is not a multiple of 256",
        }
    ]
    assert [layer["index"] for layer in output["layer_details"]] == list(range(8))
    assert output["layer_details"][0].keys() == {
        "index",
        "module",
        "default_target",
        "resolved_target",
        "promoted",
        "stored",
        "shape",
        "bytes",
        "rms",
        "relative_rms",
        "max_error",
        "cosine",
        "bias",
    }


def test_recipe_and_pattern(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("0:\n  isq: q5_0\n/router/:\n  isq: q8_0\n")
    result = run(source, tmp_path / "out", "--isq", "q8_0", "--recipe", recipe, "--format", "0.2")
    assert result.stderr == "uqff: recipe: /router/ in line 3 matches no layer\n"
    assert [layer.weight.kind for layer in uqff.open(tmp_path / "out").values()] == ["q8_0"] + ["q5_0"] * 7
    (source / "config.json").write_text("{}")
    assert run(source, tmp_path / "no", "--isq", "q8_0").exit_code == 1
    assert run(source, tmp_path / "some", "--isq", "q8_0", "--layers", "mlp", "--format", "0.2").exit_code == 0
    assert list(uqff.open(tmp_path / "some")) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--isq", "q9k"], 2, "Invalid value for '--isq': unknown type"),
        (["--isq", "Q4_K_M"], 2, "Invalid value for '--isq': unknown type; did you mean q4k?"),
        ([], 2, "Missing option '--isq'"),
        (["--isq", "q8_0", "--layers", "("], 2, "Invalid value for '--layers': bad pattern: missing )"),
        (["--isq", "q8_0", "--engine", "0.7"], 2, "'0.7' is not one of '0.6', '0.8', '0.9'"),
        (["--isq", "q8_0", "--format", "1.3"], 2, "'1.3' is not one of '0.1', '0.2', '1.0', '1.1', '1.2'"),
        (["--isq", "q8_0", "--shard-size", "much"], 2, "Invalid value for '--shard-size': expected a size such as"),
        (["--isq", "q8_0", "--shard-size", "0MB"], 2, "Invalid value for '--shard-size': expected a size such as"),
        (["--isq", "q8_0", "--dtype", "f64"], 2, "'f64' is not one of"),
        (["--isq", "q8_0", "--recipe", "missing"], 2, "File 'missing' does not exist"),
        (["--isq", "mxfp4", "--format", "0.1"], 1, "uqff: MXFP4 blobs did not exist yet"),
        (["--isq", "f8q8", "--engine", "0.6"], 1, "uqff: the engine had no f8q8 yet"),
    ],
)
def test_calls_that_fail(source: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = run(source, tmp_path / "out", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_recipe_with_an_error_is_named_with_its_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("0:\n  isq: q9k\n")
    result = run(source, tmp_path / "out", "--isq", "q8_0", "--recipe", tmp_path / "r.yaml")
    assert result.exit_code == 1
    assert re.fullmatch(rf"uqff: unknown type: .*, got q9k \(file {tmp_path}/r.yaml, field line 2\)\n", result.stderr)


def test_out_is_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--isq", "q8_0").exit_code == 0
    result = run(source, out, "--isq", "q4_0")
    assert (result.exit_code, result.stderr) == (
        2,
        f"uqff: exists and is not empty: {out}; --force replaces the UQFF model\n",
    )
    assert run(source, out, "--isq", "q4_0", "--force").exit_code == 0
    assert uqff.open(out)["model.layers.0.mlp.up_proj"].weight.kind == "q4_0"


def test_no_such_source(tmp_path: Path) -> None:
    result = run(tmp_path / "missing", tmp_path / "out", "--isq", "q8_0")
    assert (result.exit_code, result.stderr) == (2, f"uqff: no such directory or GGUF file: {tmp_path / 'missing'}\n")


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to catch")
def test_a_termination_cleans_up(source: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle: the exit code of a terminated process, nothing left."""
    # In short turns: of a signal that comes before a sleep has begun, Python hears when that is over.
    code = (
        "import sys, time, uqff.quantization.run, uqff.cli\n"
        "encode = uqff.quantization.run.encode\n"
        "def slow(*a, **k):\n"
        "    print('busy', flush=True)\n"
        "    for _ in range(3000): time.sleep(0.01)\n"
        "uqff.quantization.run.encode = slow\n"
        "sys.argv = ['uqff', 'quantize', *sys.argv[1:]]\n"
        "uqff.cli.main()\n"
    )
    arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "out"), "--isq", "q8_0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "busy\n"
        assert any(name.startswith(".out.tmp-") for name in os.listdir(tmp_path))
        start = time.perf_counter()
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 128 + signal.SIGTERM
        assert time.perf_counter() - start < 15
    assert os.listdir(tmp_path) == ["source"]


def test_a_line_for_all_fallbacks_of_one_reason(tmp_path: Path) -> None:
    """Also with ``--quiet``, which is for pipelines, not for silence; ``--json`` has a row for each."""
    source = tmp_path / "source"
    TinyModel(hidden_size=64, intermediate_size=128, heads=2, layers=2).write(source)
    result = run(source, tmp_path / "out", "--isq", "q4k", "--quiet", "--no-promote", "--format", "0.2")
    assert (result.exit_code, result.stdout) == (0, "")
    listed = ", ".join(("lm_head", *(f"model.layers.0.self_attn.{name}_proj" for name in "qk")))
    reason = "the last dimension is not a multiple of 256"
    assert result.stderr == f"uqff: fallback: q4k -> q4_1, 15 layers: {reason}: {listed} and 12 more\n"
    result = run(source, tmp_path / "json", "--isq", "q4k", "--json", "--no-promote", "--format", "0.2")
    (output,) = json.loads(result.stdout)["outputs"]
    assert [fallback["to"] for fallback in output["fallbacks"]] == ["q4_1"] * 15


def test_what_is_not_there_is_said_at_once(source: Path, tmp_path: Path) -> None:
    """Before anything heavy is imported, and before the hub is asked about a path that none of its names can be."""
    code = (
        "import sys; from uqff.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not {'numba', 'torch'} & set(sys.modules), 'heavy import'; raise"
    )
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").touch()
    for arguments, message in (
        (
            ["quantize", tmp_path / "nothing", tmp_path / "out", "--isq=q4k"],
            f"no such directory or GGUF file: {tmp_path / 'nothing'}",
        ),
        (["quantize", source, full, "--isq=q4k"], f"exists and is not empty: {full}"),
        (["run", tmp_path / "nothing", "--prompt=x"], f"Path '{tmp_path / 'nothing'}' does not exist."),
    ):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.rstrip().endswith(message)


@pytest.mark.parametrize("name", ["f16", "float16", "torch.float16"])
def test_names_of_dtypes(source: Path, tmp_path: Path, name: str) -> None:
    """Torch's mean the same; help and messages have the short ones."""
    result = run(source, tmp_path / name, "--isq", "q8_0", "--dtype", name, "--json")
    assert json.loads(result.stdout)["dtype"] == "F16"
    assert "float16" not in run("--help").stdout


def test_biases_that_the_engine_drops(tmp_path: Path) -> None:
    """Said on the terminal and in the JSON: of Llama; not of Qwen2, whose loader reads them."""
    for architecture, expected in (("Llama", 1), ("Qwen2", 0)):
        source = tmp_path / architecture
        source.mkdir()
        config = {"architectures": [f"{architecture}ForCausalLM"], "num_hidden_layers": 1}
        (source / "config.json").write_text(json.dumps(config))
        names = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
        tensors = {f"model.layers.0.{name}.weight": torch.ones(32, 32) for name in names}
        tensors |= {f"{name}.weight": torch.ones(32, 32) for name in ("model.embed_tokens", "lm_head")}
        save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, source / "model.safetensors")
        said = ["1 bias of Llama stored: the engine drops such when it quantises, and adds them when it loads"]
        result = run(source, source / "out", "--isq", "q8_0", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["notes"] == said[:expected]
        assert (f"uqff: note: {said[0]}" in result.stderr) is bool(expected)
