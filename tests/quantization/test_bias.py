"""A layer's bias: nothing of it is lost unless that was asked for, and what is lost is told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import uqff
from tests.support.roundtrip import same_bytes
from tools.tiny.models import TinyModel
from uqff import DType, UnsupportedError
from uqff.cli import main
from uqff.families import AFQ, F8Q8, FAMILIES, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant
from uqff.families.part import Part
from uqff.inspection.compare import compare
from uqff.inspection.verify import notes_of
from uqff.quantization.bias import bias_distance, cast_bias, widened_bias
from uqff.quantization.run import quantize_model

QUERY = "model.layers.0.self_attn.q_proj"
V0, V1 = (0, 2, 0), (1, 2, 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A qwen2 checkpoint in float32 whose first biases do not fit float8."""
    folder = tmp_path / "source"
    TinyModel("qwen2", hidden_size=64, heads=2, intermediate_size=64).write(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{QUERY}.bias"][:3] = torch.tensor([600.0, 0.0009, 1.5])
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def stored_bias(folder: Path) -> torch.Tensor:
    with uqff.open(folder) as file:
        bias = file[QUERY].bias
        assert bias is not None
        return bias.clone()


def test_every_family_says_in_what_its_biases_are() -> None:
    """For a load dtype of float16: what 0.x and 1.x readers add, and what the engine writes."""
    f32, f16 = DType.F32, DType.F16
    table: dict[type[QuantizedTensor], tuple[DType, DType, DType]] = {
        GGUF: (f32, f16, f32),
        Unquant: (f16, f16, f16),
        HQQ: (f32, f32, f32),
        FP8: (f16, f16, DType.F8E4M3),
        AFQ: (f16, f16, f16),
        F8Q8: (f32, f16, f32),
        MXFP4: (f16, f16, DType.BF16),
    }
    assert set(table) == set(FAMILIES)
    for record, (older, current, engine) in table.items():
        assert record.BIAS.dtype(f16, V0) is older
        assert record.BIAS.dtype(f16, V1) is current
        assert {record.BIAS.dtype(f16, version, engine=True) for version in (V0, V1)} == {engine}


def test_biases_are_rounded_to_the_load_dtype_first() -> None:
    """1 + 2^-9 is between two bfloat16 numbers; 500 saturates in float8, where 448 is the end."""
    bias = torch.tensor([1 + 2**-9, 500.0, -0.3])
    made = cast_bias(bias, GGUF, torch.bfloat16, version=V0)
    assert same_bytes(made, torch.tensor([1.0, 500.0, -0.30078125]))
    engines = cast_bias(bias, FP8, version=V1, engine_biases=True)
    assert same_bytes(engines, torch.tensor([1.0, 448.0, -0.3125]).to(torch.float8_e4m3fn))
    assert same_bytes(cast_bias(bias, FP8, version=V1), bias)
    with pytest.raises(UnsupportedError, match=r"not a dtype that biases are loaded as.*got torch\.float64"):
        cast_bias(bias.double(), FP8, version=V1)


def test_stored_biases_of_all_dtypes_are_numbers() -> None:
    """Whatever may be stored can be compared: -3 in those that have a sign."""
    for dtype in DType:
        if dtype.storable:
            stored = torch.tensor([3, 0]).to(dtype.torch) if dtype in (DType.U8, DType.U32) else torch.tensor([-3, 0])
            part = Part.of_tensor(stored.to(dtype.torch))
            assert widened_bias(part).tolist() == stored.to(torch.float32).tolist()
            assert bias_distance(part, part).largest == 0


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "q8_0", "afq4", "hqq8", "f8q8", "unquant"])
@pytest.mark.parametrize("format", ["0.2", "1.2"])
def test_no_bias_loses_anything(source: Path, tmp_path: Path, kind: str, format: str) -> None:
    """Every type, in either generation: 600 and 0.0009 stay what they are, and nothing is told."""
    result = quantize_model(source, tmp_path / "out", [kind], version=format)
    with uqff.open(tmp_path / "out") as file:
        (bias,) = (layer.bias for key, layer in file.items() if key in (QUERY, "1"))
    assert same_bytes(bias, load_file(source / "model.safetensors")[f"{QUERY}.bias"])
    assert result.outputs[0].bias_losses == []
    assert [note for note in notes_of(tmp_path / "out") if note.rule == "bias-rounded"] == []


def test_the_engines_biases_are_made_on_request_and_what_they_lose_is_told(source: Path, tmp_path: Path) -> None:
    """By `quantize`, as text and as JSON; by `verify`, of the file alone; by `diff`, measured against the source."""
    made = run("quantize", source, tmp_path / "fp8", "--isq", "fp8", "--engine-biases")
    assert made.exit_code == 0
    line = "uqff: fp8: 3 biases stored as F8_E4M3 without a scale lost something: the largest error is 152, "
    assert line in made.stderr
    assert "fp8 biases  3 in F8_E4M3" in made.stdout
    bias = stored_bias(tmp_path / "fp8")
    assert (bias.dtype, bias[:3].tolist()) == (torch.float8_e4m3fn, [448.0, 0.0, 1.5])
    document = json.loads(
        run("quantize", source, tmp_path / "mxfp4", "--isq", "mxfp4", "--engine-biases", "--json").stdout
    )["outputs"][0]
    assert stored_bias(tmp_path / "mxfp4").dtype is torch.bfloat16
    (loss,) = document["bias_losses"]
    assert (loss["dtype"], len(loss["layers"]), 0 < loss["max_error"] < 0.001) == ("BF16", 3, True)
    details = {each["module"]: each["bias"] for each in document["layer_details"]}
    assert details["lm_head"] is None
    assert details[QUERY]["dtype"] == "BF16"

    verified = run("verify", tmp_path / "fp8")
    assert verified.exit_code == 0
    assert (
        "note: 3 biases of FP8 layers in F8E4M3 without a scale: rounded to four bits when they were" in verified.stdout
    )
    notes = json.loads(run("verify", tmp_path / "mxfp4", "--json").stdout)["notes"]
    assert [note["rule"] for note in notes] == ["bias-rounded", "bias-in-one-dtype"]
    assert "BF16, in which the residual's F32 numbers do not fit" in notes[0]["text"]

    difference = next(each for each in compare(source, tmp_path / "fp8") if each.key == QUERY)
    assert difference.bias_dtypes == ("F32", "F8_E4M3")
    assert difference.bias is not None
    assert difference.bias.largest == 152.0
    text = run("diff", source, tmp_path / "fp8").stdout
    assert "biases of 3 layers differ: F32 in A, F8_E4M3 in B, max error 152" in text
    found = {
        each["key"]: each["bias"]
        for each in json.loads(run("diff", tmp_path / "fp8", source, "--json").stdout)["layers"]
    }
    assert found["lm_head"] is None
    assert (found[QUERY]["a"], found[QUERY]["b"], found[QUERY]["max_error"]) == ("F8_E4M3", "F32", 152.0)


def test_two_models_are_compared_with_their_biases(source: Path, tmp_path: Path) -> None:
    """Of the same weights: only the biases differ."""
    quantize_model(source, tmp_path / "a", ["fp8"])
    quantize_model(source, tmp_path / "b", ["fp8"], engine_biases=True)
    far = {each.key: each for each in compare(tmp_path / "a", tmp_path / "b")}
    assert (far[QUERY].identical, far[QUERY].distance.rms) == (False, 0.0)  # type: ignore[union-attr]
    assert far[QUERY].bias_dtypes == ("F32", "F8_E4M3")
    assert far[QUERY].bias.largest == 152.0  # type: ignore[union-attr]
    assert (far["lm_head"].identical, far["lm_head"].bias) == (True, None)


def test_a_load_dtype_that_rounds_is_told(source: Path, tmp_path: Path) -> None:
    """Also where it is the user's: float16 has no 1e5."""
    tensors = load_file(source / "model.safetensors")
    tensors[f"{QUERY}.bias"][0] = 1e5
    save_file(tensors, source / "model.safetensors")
    result = quantize_model(source, tmp_path / "out", ["q8_0"], dtype="f16")
    (loss,) = result.outputs[0].bias_losses
    assert (loss.dtype, len(loss.layers), loss.largest) == (DType.F16, 3, math.inf)
