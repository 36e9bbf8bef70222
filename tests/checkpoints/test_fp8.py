"""FP8 checkpoints against transformers' own dequantiser (scales that divide the weight), and by hand (tail blocks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint_of, same_bits
from uqff import FormatError, MissingError, ShapeError, Shard, UnsupportedError
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.families import FP8, Unquant

E4M3 = torch.float8_e4m3fn
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Every number that e4m3 has, in an order of their own."""
    made = torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return torch.where(made % 128 == 127, made - 1, made).view(E4M3)


def by_transformers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "Fp8Dequantize"):
        pytest.skip("this transformers does not dequantise FP8")
    made: torch.Tensor = module.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    return made


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
def test_blocks(tmp_path: Path, name: str) -> None:
    """Bit for bit what transformers makes of them, in slices and of stacked experts too."""
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    dtype = getattr(torch, name)
    numbers = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 0.01
    scales = (numbers * 255).to(torch.uint8) if dtype == torch.uint8 else numbers.to(dtype)
    a, experts = codes(48, 64), codes(2, 48, 64, seed=2)
    stacked = torch.stack([scales.view(torch.uint8), scales.view(torch.uint8).flip(0)]).view(dtype)
    tensors = {
        "a.weight": a,
        "a.weight_scale_inv": scales,
        "a.bias": torch.ones(48),
        "e.up_proj": experts,
        "e.up_proj_scale_inv": stacked,
        "lm_head.weight": torch.ones(4, 64),
    }
    config = FP8_CONFIG | {"weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint:
        assert sorted(checkpoint) == ["a", "e.up_proj", "lm_head"]
        assert (checkpoint.kind("a"), checkpoint.dtype("a"), checkpoint.shape("e.up_proj")) == (
            ("fp8-block", "F8_E4M3", (2, 48, 64))
        )
        weight, bias = checkpoint.layer("a")
        assert same_bits(weight.dequantize(), by_transformers(a, scales))
        assert torch.equal(bias, torch.ones(48))
        part = checkpoint.layer("a", Shard.simple(1, 1, 2)).weight
        assert same_bits(part.dequantize(), by_transformers(a, scales)[:, 32:].contiguous())
        assert same_bits(
            checkpoint.layer("e.up_proj").weight.dequantize_expert(1), by_transformers(experts[1], stacked[1])
        )
        assert isinstance(checkpoint.layer("lm_head").weight, Unquant)


def test_tail_blocks(tmp_path: Path) -> None:
    """By hand: the last blocks of rows and columns are smaller, which transformers does not read."""
    weight, scales = codes(5, 7), torch.rand(2, 2, dtype=torch.float32)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales}
    with checkpoint_of(tmp_path, tensors, **FP8_CONFIG, weight_block_size=[3, 4]) as checkpoint:
        wide = scales.repeat_interleave(3, 0)[:5].repeat_interleave(4, 1)[:, :7]
        assert same_bits(checkpoint.layer("a").weight.dequantize(), weight.float() * wide)


@pytest.mark.parametrize("shape", [(32, 0), (0, 32), (0, 0), (2, 0, 4), (0, 3, 4)])
def test_weights_without_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """No outputs, no inputs or no experts: a weight of that shape, not an error of numpy."""
    blocks = torch.ones(*shape[:-2], -(-shape[-2] // 3), -(-shape[-1] // 4))
    tensors = {"a.weight": torch.zeros(shape).to(torch.float8_e4m3fn), "a.weight_scale_inv": blocks}
    with checkpoint_of(tmp_path, tensors, **FP8_CONFIG, weight_block_size=[3, 4]) as checkpoint:
        assert checkpoint.layer("a").weight.dequantize().shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale_is_an_fp8_record(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    """Whatever the scale is called, it multiplies; that of the activations goes where the format has a place for it."""
    weight, scale = codes(6, 8), torch.full(shape, 0.1, dtype=torch.bfloat16)
    tensors = {"a.weight": weight, f"a.{name}": scale, "a.input_scale": torch.tensor([0.25])}
    with checkpoint_of(tmp_path, tensors, **FP8_CONFIG) as checkpoint:
        record = checkpoint.layer("a").weight
        assert isinstance(record, FP8)
        assert checkpoint.meta("a").weight.to_entries().keys() == record.to_entries().keys()
        assert same_bits(record.dequantize(), weight.float() * scale.float())
        assert (record.dequant_x_scale.item(), record.quant_scale) == (0.25, 1 / record.dequant_w_scale)
        assert record.parts["weight"].data.obj is checkpoint.tensors.raw("a.weight").obj  # a view of the file


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_for_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scales = codes(6, 8), torch.rand(shape)
    with checkpoint_of(tmp_path, {"a.weight": weight, "a.weight_scale": scales}, **FP8_CONFIG) as checkpoint:
        record = checkpoint.layer("a").weight
        assert isinstance(record, ScaledFP8)
        assert record.kind == "fp8-channel"
        assert same_bits(record.dequantize(), weight.float() * scales.view(6, 1))
        assert same_bits(record.narrow(1, 3, 2).dequantize(), record.dequantize()[:, 3:5].contiguous())
        assert record.join([(0, record.narrow(1, 0, 3)), (3, record.narrow(1, 3, 5))], 1) == record


@pytest.mark.parametrize(
    ("scales", "block", "error", "problem"),
    [
        (
            None,
            None,
            MissingError,
            r"a companion of the weight is missing: expected a tensor weight_scale_inv beside a",
        ),
        (torch.ones(2, 2), None, ShapeError, r"scales do not fit the weight.*got \[2, 2\] .*a\.weight_scale_inv"),
        (torch.ones(2, 3), [3, 4], ShapeError, r"wrong shape: expected \[2, 2\], got \[2, 3\] .*model.safetensors"),
        (torch.ones(2, 2, dtype=torch.int32), [3, 4], FormatError, r"wrong dtype: expected F32 or .*got I32"),
        (torch.tensor([[1, 1], [1, float("inf")]]), [3, 4], FormatError, r"got element 3 .*a\.weight_scale_inv"),
        (torch.tensor(float("nan")), None, FormatError, r"expected a finite number"),
        (torch.full((2, 2), 255, dtype=torch.uint8), [3, 4], FormatError, r"scale is not a number: expected an exp"),
    ],
)
def test_companions_that_do_not_fit(
    tmp_path: Path, scales: torch.Tensor | None, block: Any, error: type[Exception], problem: str
) -> None:
    tensors = {"a.weight": codes(5, 7)} | ({} if scales is None else {"a.weight_scale_inv": scales})
    with (
        checkpoint_of(tmp_path, tensors, **FP8_CONFIG, weight_block_size=block) as checkpoint,
        pytest.raises(error, match=problem),
    ):
        checkpoint["a"]


@pytest.mark.parametrize("name", ["a.weight", "experts.up_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_beside_plain_numbers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Numbers that may or may not be multiplied by it are not taken without it."""
    scale = f"{name}_scale_inv"
    with checkpoint_of(tmp_path, {name: torch.ones(2, 4, 4, dtype=dtype), scale: torch.ones(2)}, **FP8_CONFIG) as made:
        assert list(made) == [name.removesuffix(".weight")]
        with pytest.raises(FormatError, match=rf"wrong dtype: expected F8_E4M3, got B?F\d+ .*{name}"):
            made[name.removesuffix(".weight")]


@pytest.mark.parametrize(
    ("setting", "error", "problem"),
    [
        ({"fmt": "e5m2"}, UnsupportedError, r"expected one of e4m3.*got e5m2 .*quantization_config\.fmt"),
        ({"weight_block_size": [128]}, FormatError, r"not a size of blocks.*got \[128\]"),
        ({"weight_block_size": [128, 0]}, FormatError, r"not a size of blocks"),
        ({"modules_to_not_convert": "lm_head"}, FormatError, r"not a list of modules"),
        ({"modules_to_not_convert": ["re:("]}, FormatError, r"not a regular expression"),
    ],
)
def test_settings_that_do_not_exist(
    tmp_path: Path, setting: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        checkpoint_of(tmp_path, {"a.weight": codes(5, 7)}, **FP8_CONFIG | setting)
