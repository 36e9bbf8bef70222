"""`uqff diff` and `uqff.compare`: models against models and checkpoints; numbers, exit codes, mismatches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import uqff
from uqff import Layer
from uqff.cli import main
from uqff.compare import compare
from uqff.families import HQQ
from uqff.isq import KINDS, quantize
from uqff.pipeline import quantize_model
from uqff.selector import Pattern

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tiny_models import TinyModel


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and three models of it in a directory."""
    folder = tmp_path_factory.mktemp("models")
    TinyModel(hidden_size=64, heads=2, intermediate_size=96).write(folder / "source")
    for kind in ("q8_0", "q4_0"):
        quantize_model(folder / "source", folder / kind, [kind], format="0.2")
    quantize_model(folder / "source", folder / "old", ["q8_0"], format="0.1")
    return folder


def test_a_model_and_its_checkpoint(models: Path) -> None:
    """Measured against the weights as they are in the checkpoint, in either order of the arguments."""
    tensors = load_file(models / "source" / "model.safetensors")
    file = uqff.open(models / "q4_0")
    forth = list(compare(models / "source", models / "q4_0"))
    for key, layer in zip(file, forth, strict=True):
        weight = tensors[f"{layer.module}.weight"]
        error = file[key].weight.dequantize() - weight
        assert (layer.key, layer.shape, layer.identical) == (key, tuple(weight.shape), False)
        assert (layer.a.kind, layer.a.nbytes) == ("f32", weight.nbytes)
        assert (layer.b.kind, layer.b.nbytes) == ("q4_0", len(file.blob(key)))
        assert layer.distance.largest == error.abs().max().item()
        assert layer.distance.rms == pytest.approx(error.double().pow(2).mean().sqrt().item(), rel=1e-6)
        assert layer.distance.norm == pytest.approx(weight.double().pow(2).mean().sqrt().item(), rel=1e-6)
        cosine = torch.cosine_similarity(weight.double().view(-1), file[key].weight.dequantize().double().view(-1), 0)
        assert layer.distance.cosine == pytest.approx(cosine.item(), abs=1e-6)
    back = list(compare(models / "q4_0", models / "source"))
    assert [layer.distance for layer in back] == [layer.distance for layer in forth]
    assert (back[0].a, back[0].b) == (forth[0].b, forth[0].a)


def test_identical_models(models: Path) -> None:
    """The version word is not part of a layer."""
    for other in ("q8_0", "old"):
        for layer in compare(models / "q8_0", models / other):
            assert layer.identical
            assert (layer.distance.rms, layer.distance.largest) == (0.0, 0.0)
            assert layer.distance.cosine == pytest.approx(1.0, abs=1e-7)


def test_a_bias_makes_a_difference(tmp_path: Path) -> None:
    weight = quantize(torch.ones(2, 32), "q8_0")
    for name, bias in (("a", torch.zeros(2)), ("b", torch.tensor([0.0, -0.0])), ("c", None)):
        uqff.save({0: Layer(weight, bias)}, tmp_path / f"{name}.uqff")
    identical = {
        other: [layer.identical for layer in compare(tmp_path / "a.uqff", tmp_path / f"{other}.uqff")]
        for other in ("a", "b", "c")
    }
    assert identical == {"a": [True], "b": [False], "c": [False]}


@pytest.mark.parametrize("kind", [*KINDS, "hqq1", "hqq2", "hqq3", "unquant"])
def test_tiles_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family is cut and measured in pieces; the largest error is exact."""
    weight = torch.randn((9, 256), generator=torch.Generator().manual_seed(3)) * 0.02
    record = quantize(weight, kind)
    whole = uqff.distance.distance(weight.numpy(), record)
    monkeypatch.setattr(uqff.distance, "TILE", 700)
    assert len(list(uqff.distance.tiles(record))) >= 3
    tiled = uqff.distance.distance(weight.numpy(), record)
    assert tiled.largest == whole.largest == (record.dequantize() - weight).abs().max().item()
    assert tiled.rms == pytest.approx(whole.rms, rel=1e-6)


def test_other_axes_are_measured_whole() -> None:
    """HQQ along axis 1, which the engine never writes."""
    record = HQQ(torch.full((8, 64), 7, dtype=torch.uint8), torch.ones(8, 1), torch.ones(8, 1), (8, 64), 8, 64, axis=1)
    assert record.dequantize().unique().tolist() == [6.0]
    weight = torch.full((8, 64), 5.0)
    measured = uqff.distance.distance(weight.numpy(), record)
    assert (measured.rms, measured.norm, measured.largest, measured.relative) == (1.0, 5.0, 1.0, 0.2)


def test_degenerate_weights() -> None:
    zero, one = torch.zeros(1, 32), torch.ones(1, 32)
    distance = uqff.distance.distance
    both = distance(zero.numpy(), quantize(zero, "unquant"))
    assert (both.rms, both.relative, both.largest, both.cosine) == (0.0, 0.0, 0.0, 1.0)
    from_zero = distance(zero.numpy(), quantize(one, "unquant"))
    assert (from_zero.rms, from_zero.relative, from_zero.largest, from_zero.cosine) == (1.0, float("inf"), 1.0, 0.0)


def test_the_table(models: Path) -> None:
    result = run(models / "source", models / "q8_0")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert " ".join(lines[0].split()) == ("layer shape A B A bytes B bytes bytes RMS error relative max error cosine")
    assert lines[1].startswith("0 lm_head                          64 x 64  f32  q8_0   16,384    4,378  differ  0.000")
    assert lines[-1] == "0 of 8 layers have the same bytes"
    assert run(models / "old", models / "q8_0").stdout.splitlines()[-1] == "8 of 8 layers have the same bytes"


def test_json(models: Path) -> None:
    document = json.loads(run(models / "q4_0" / "q4_0-0.uqff", models / "q8_0", "--json").stdout)
    assert (document["a"], document["identical"], len(document["layers"])) == (
        str(models / "q4_0" / "q4_0-0.uqff"),
        False,
        8,
    )
    first = document["layers"][0]
    assert (first["key"], first["module"], first["shape"]) == ("0", None, [64, 64])
    assert (first["a"]["type"], first["b"]["type"], first["b"]["bytes"]) == ("q4_0", "q8_0", 4378)
    assert first["rms"] > 0
    assert json.loads(run(models / "q8_0", models / "old", "--json").stdout)["identical"] is True


def test_models_that_do_not_fit(models: Path, tmp_path: Path) -> None:
    weight = quantize(torch.ones(2, 32), "q8_0")
    uqff.save({0: weight, 1: weight}, tmp_path / "two.uqff")
    uqff.save({0: weight, 2: weight}, tmp_path / "gap.uqff")
    uqff.save({0: weight, 1: quantize(torch.ones(4, 32), "q8_0")}, tmp_path / "shape.uqff")
    for other, message in [
        ("gap.uqff", "the two do not have the same layers: expected 2 layers, got 2, without 1"),
        ("shape.uqff", "weights differ in shape: expected [2, 32], got [4, 32]"),
    ]:
        result = run(tmp_path / "two.uqff", tmp_path / other)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"uqff: {message}")
    assert run(models / "source", tmp_path / "two.uqff").exit_code == 1
    both = run(models / "source", models / "source")
    assert (both.exit_code, both.stderr.split(":")[1]) == (1, " two checkpoints")
    assert run(models / "source", tmp_path / "missing").exit_code == 2
    assert run(models / "source").exit_code == 2


def test_other_architectures_by_pattern(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "source" / "model.safetensors")
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    quantize_model(tmp_path / "source", tmp_path / "out", ["q8_0"], layers=Pattern("mlp"), format="0.2")
    assert run(tmp_path / "source", tmp_path / "out").exit_code == 1
    result = run(tmp_path / "source", tmp_path / "out", "--layers", "mlp")
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines()[1:4]] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
