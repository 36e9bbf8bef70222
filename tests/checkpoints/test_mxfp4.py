"""MXFP4 checkpoints against transformers' own dequantiser; gate and up that take turns; what cannot be taken over."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import checkpoint_of, same_bits
from uqff import FormatError, MissingError, ShapeError, Shard, UnsupportedError
from uqff.codec.turns import split_gate_up
from uqff.families import MXFP4


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def exponents(*shape: int) -> torch.Tensor:
    return torch.randint(100, 140, shape, generator=torch.Generator().manual_seed(6), dtype=torch.uint8)


def by_transformers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[experts, out, in]``, of bfloat16, which holds these numbers exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, at something else in the module
        module = pytest.importorskip("transformers.integrations.mxfp4", reason="this transformers has no MXFP4")
    return module.convert_moe_packed_tensors(blocks, scales).transpose(1, 2).float().contiguous()


def test_gpt_oss(tmp_path: Path) -> None:
    blocks, scales, bias = codes(2, 6, 3, 16), exponents(2, 6, 3), torch.arange(12.0).view(2, 6).bfloat16()
    path = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{path}_blocks": blocks,
        f"{path}_scales": scales,
        f"{path}_bias": bias,
        "model.layers.0.self_attn.sinks": torch.ones(4),
    }
    ignored = ["model.layers.*.self_attn", "lm_head"]
    with checkpoint_of(tmp_path, tensors, quant_method="mxfp4", modules_to_not_convert=ignored) as checkpoint:
        assert sorted(checkpoint) == [path, "model.layers.0.self_attn.sinks"]
        assert (checkpoint.shape(path), checkpoint.dtype(path), checkpoint.kind(path)) == ((2, 6, 96), "U8", "mxfp4")
        layer, plain = checkpoint.layer(path), by_transformers(blocks, scales)
        assert isinstance(layer.weight, MXFP4)
        assert same_bits(layer.weight.dequantize(), plain)
        assert layer.bias is not None
        assert torch.equal(layer.bias, bias)
        assert layer.weight.parts["blocks"].data.obj is checkpoint.tensors.raw(f"{path}_blocks").obj
        one = checkpoint.layer(path, Shard.simple(0, 1, 2))
        assert same_bits(one.weight.dequantize(), plain[1:])
        assert one.bias is not None
        assert torch.equal(one.bias, bias[1:])
        for half, at in zip(split_gate_up(layer), (0, 1), strict=True):
            assert same_bits(half.weight.dequantize(), plain[:, at::2])
            assert half.bias is not None
            assert torch.equal(half.bias, bias[:, at::2])
        assert [half.weight.shape for half in split_gate_up(checkpoint.meta(path))] == [(2, 3, 96)] * 2


@pytest.mark.parametrize("names", [("a.weight", "a.scales"), ("a.weight", "a.weight_scale"), ("a.blocks", "a.scales")])
def test_matrices(tmp_path: Path, names: tuple[str, str]) -> None:
    blocks, scales = codes(6, 48), exponents(6, 3)
    tensors = {names[0]: blocks, names[1]: scales}
    with checkpoint_of(tmp_path, tensors, quant_method="mxfp4") as checkpoint:
        plain = by_transformers(blocks.view(1, 6, 3, 16), scales[None])[0]
        assert same_bits(checkpoint.layer("a").weight.dequantize(), plain)


@pytest.mark.parametrize(
    ("scales", "blocks", "error", "problem"),
    [
        (None, codes(2, 4, 3, 16), MissingError, r"a companion.*tensor scales beside a_blocks"),
        (exponents(2, 4, 2), codes(2, 4, 3, 16), ShapeError, r"expected \[2, 4, 3\], got \[2, 4, 2\] .*a_scales"),
        (torch.ones(2, 4, 3), codes(2, 4, 3, 16), FormatError, r"expected U8 or F8_E8M0, got F32"),
        (exponents(2, 4, 3), codes(2, 4, 3, 16).long(), FormatError, r"expected U8, got I64 .*a_blocks"),
        (exponents(2, 4, 3), codes(2, 4, 3, 8), ShapeError, r"wrong shape: expected \[..., in/32, 16\]"),
        (exponents(2, 4, 3).fill_(255), codes(2, 4, 3, 16), FormatError, r"scale is not a number"),
        (exponents(2, 4, 3).fill_(0), codes(2, 4, 3, 16), UnsupportedError, r"no MXFP4 block with a scale of 2\^-127"),
    ],
)
def test_companions_that_do_not_fit(
    tmp_path: Path, scales: torch.Tensor | None, blocks: torch.Tensor, error: type[Exception], problem: str
) -> None:
    tensors = {"a_blocks": blocks} | ({} if scales is None else {"a_scales": scales})
    with checkpoint_of(tmp_path, tensors, quant_method="mxfp4") as checkpoint, pytest.raises(error, match=problem):
        checkpoint["a"]


def test_blocks_of_zeros_may_have_any_scale(tmp_path: Path) -> None:
    """0 times 2^-127 is 0 times 0, and keeps its sign."""
    tensors = {"a_blocks": torch.full((1, 1, 1, 16), 0x80, dtype=torch.uint8), "a_scales": torch.zeros(1, 1, 1).byte()}
    with checkpoint_of(tmp_path, tensors, quant_method="mxfp4") as checkpoint:
        plain = by_transformers(tensors["a_blocks"], tensors["a_scales"])
        assert same_bits(checkpoint.layer("a").weight.dequantize(), plain)
