"""`uqff diff` and `uqff.inspection.compare`: models against models and checkpoints; numbers, exit codes, mismatches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import uqff
from tools.tiny.architectures import write
from tools.tiny.models import TinyModel
from uqff import Layer, ShardError
from uqff.cli import main
from uqff.families import HQQ, QuantizedTensor
from uqff.inspection.compare import LayerDifference, Side, compare
from uqff.models.patterns import Pattern
from uqff.quantization.error import Distance, distance
from uqff.quantization.run import quantize_model
from uqff.quantization.types import KINDS, quantize


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and three models of it in a directory."""
    folder = tmp_path_factory.mktemp("models")
    TinyModel(hidden_size=64, heads=2, intermediate_size=96).write(folder / "source")
    for kind in ("q8_0", "q4_0"):
        quantize_model(folder / "source", folder / kind, [kind], version="0.2")
    quantize_model(folder / "source", folder / "old", ["q8_0"], version="0.1")
    return folder


def sides(layer: LayerDifference) -> tuple[Side, Side, Distance]:
    """Both sides of a layer that both models have, and how far they are apart."""
    assert layer.a is not None
    assert layer.b is not None
    assert layer.distance is not None
    return layer.a, layer.b, layer.distance


def test_a_model_and_its_checkpoint(models: Path) -> None:
    """Measured against the weights as they are in the checkpoint, in either order of the arguments."""
    tensors = load_file(models / "source" / "model.safetensors")
    file = uqff.open(models / "q4_0")
    forth = list(compare(models / "source", models / "q4_0"))
    for key, layer in zip(file, forth, strict=True):
        weight = tensors[f"{layer.module}.weight"]
        error = file[key].weight.dequantize() - weight
        assert (layer.key, layer.shape, layer.identical) == (key, tuple(weight.shape), False)
        a, b, measured = sides(layer)
        assert (a.kind, a.nbytes) == ("f32", weight.nbytes)
        assert (b.kind, b.nbytes) == ("q4_0", len(file.blob(key)))
        assert measured.largest == error.abs().max().item()
        assert measured.rms == pytest.approx(error.double().pow(2).mean().sqrt().item(), rel=1e-6)
        assert measured.norm == pytest.approx(weight.double().pow(2).mean().sqrt().item(), rel=1e-6)
        cosine = torch.cosine_similarity(weight.double().view(-1), file[key].weight.dequantize().double().view(-1), 0)
        assert measured.cosine == pytest.approx(cosine.item(), abs=1e-6)
    back = list(compare(models / "q4_0", models / "source"))
    assert [layer.distance for layer in back] == [layer.distance for layer in forth]
    assert (back[0].a, back[0].b) == (forth[0].b, forth[0].a)


def test_identical_models(models: Path) -> None:
    """The version word is not part of a layer."""
    for other in ("q8_0", "old"):
        for layer in compare(models / "q8_0", models / other):
            assert layer.identical
            _, _, measured = sides(layer)
            assert (measured.rms, measured.largest) == (0.0, 0.0)
            assert measured.cosine == pytest.approx(1.0, abs=1e-7)


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
    whole = distance(weight.numpy(), record)
    monkeypatch.setattr(QuantizedTensor, "TILE", 700)
    assert len(list(record.tiles())) >= 3
    tiled = distance(weight.numpy(), record)
    assert tiled.largest == whole.largest == (record.dequantize() - weight).abs().max().item()
    assert tiled.rms == pytest.approx(whole.rms, rel=1e-6)


def test_other_axes_are_measured_whole() -> None:
    """HQQ along axis 1, which the engine never writes."""
    record = HQQ(torch.full((8, 64), 7, dtype=torch.uint8), torch.ones(8, 1), torch.ones(8, 1), (8, 64), 8, 64, axis=1)
    assert record.dequantize().unique().tolist() == [6.0]
    weight = torch.full((8, 64), 5.0)
    measured = distance(weight.numpy(), record)
    assert (measured.rms, measured.norm, measured.largest, measured.relative) == (1.0, 5.0, 1.0, 0.2)


def test_degenerate_weights() -> None:
    zero, one = torch.zeros(1, 32), torch.ones(1, 32)
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
    result = run(tmp_path / "two.uqff", tmp_path / "shape.uqff")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("uqff: weights differ in shape: expected [2, 32], got [4, 32]")
    result = run(tmp_path / "two.uqff", tmp_path / "gap.uqff")
    assert (result.exit_code, result.stderr) == (1, "")
    _, *rows = (line.split() for line in result.stdout.splitlines())
    assert [(row[0], row[4:6], row[8]) for row in rows[:1]] == [("0", ["q8_0", "q8_0"], "same")]
    assert [(row[0], row[4:6], row[8:11]) for row in rows[1:3]] == [
        ("1", ["q8_0", "-"], ["only", "in", "A"]),
        ("2", ["-", "q8_0"], ["only", "in", "B"]),
    ]
    assert result.stdout.splitlines()[-3:] == ["1 of 3 layers have the same bytes", "1 only in A", "1 only in B"]
    document = json.loads(run(tmp_path / "two.uqff", tmp_path / "gap.uqff", "--json").stdout)
    assert [(row["a"], row["rms"]) for row in document["layers"][2:]] == [(None, None)]
    assert document["layers"][1]["a"] == {"type": "q8_0", "bytes": 94, "key": "1"}
    assert document["identical"] is False
    assert run(models / "source", tmp_path / "two.uqff").exit_code == 1
    both = run(models / "source", models / "source")
    assert (both.exit_code, both.stderr.split(":")[1]) == (1, " two checkpoints")
    assert run(models / "source", tmp_path / "missing").exit_code == 2
    assert run(models / "source").exit_code == 2


def test_other_architectures_by_pattern(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "source" / "model.safetensors")
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    quantize_model(tmp_path / "source", tmp_path / "out", ["q8_0"], layers=Pattern("mlp"), version="0.2")
    assert run(tmp_path / "source", tmp_path / "out").exit_code == 1
    result = run(tmp_path / "source", tmp_path / "out", "--layers", "mlp")
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines()[1:4]] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]


@pytest.mark.parametrize("joined", [False, True])
def test_a_1_x_model_and_its_checkpoint(joined: bool, tmp_path: Path) -> None:
    """By path, stacks against all experts; an embedding that is no layer, as in a file that was migrated, is none."""
    write("Mixtral", tmp_path / "source", joined=joined)
    result = quantize_model(tmp_path / "source", tmp_path / "out", ["q8_0"])
    differences = list(compare(tmp_path / "source", tmp_path / "out"))
    made = {layer.module: layer for layer in result.outputs[0].layers}
    assert [each.key for each in differences] == [each.module for each in differences] == list(made)
    for each in differences:
        a, b, measured = sides(each)
        assert measured.rms == pytest.approx(made[each.key].distance.rms, rel=1e-6)
        assert measured.largest == made[each.key].distance.largest
        assert (a.kind, a.nbytes) == ("f32", 4 * made[each.key].weights)
        assert (b.kind, b.nbytes, each.shape) == ("q8_0", made[each.key].nbytes, made[each.key].shape)
    file = uqff.open(tmp_path / "out")
    fewer = {key: file[key] for key in file if key != "model.embed_tokens"}
    uqff.save(fewer, tmp_path / "fewer.uqff", version=(1, 2, 0))
    assert [each.key for each in compare(tmp_path / "source", tmp_path / "fewer.uqff")] == list(fewer)
    fewer.popitem()
    uqff.save(fewer, tmp_path / "fewer.uqff", version=(1, 2, 0))
    with pytest.raises(ShardError, match="do not have the same layers"):
        list(compare(tmp_path / "source", tmp_path / "fewer.uqff"))
    shown = run(tmp_path / "source", tmp_path / "out").stdout.splitlines()[1].split()
    assert shown[:3] == ["lm_head", "64", "x"]
