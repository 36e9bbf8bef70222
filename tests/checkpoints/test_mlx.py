"""MLX checkpoints against MLX itself: it quantises, and dequantises in float32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.checkpoints import checkpoint_of, same_bits, write_checkpoint
from uqff import FormatError, MissingError, ShapeError, Shard, UnsupportedError, open_checkpoint, serialize
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.families import AFQ, MXFP4, Unquant

mx = pytest.importorskip("mlx.core", reason="no MLX for this system")


def of_mlx(array: Any) -> torch.Tensor:
    """An array as a tensor of the same bits."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def quantised(shape: tuple[int, ...], dtype: Any = None, **how: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that MLX stores of random weights, and what it makes of them in float32."""
    mx.random.seed(3)
    weight = mx.random.normal(shape).astype(dtype or mx.float32)
    parts = mx.quantize(weight, **how)
    wide = [part.astype(mx.float32) if how.get("mode", "affine") == "affine" else part for part in parts[1:]]
    plain = mx.dequantize(parts[0], *wide, **how).astype(mx.float32)
    names = ("weight", "scales", "biases")
    return {name: of_mlx(part) for name, part in zip(names, parts, strict=False)}, of_mlx(plain)


def named(path: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (5, 64), (6, 128), (8, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_affine(tmp_path: Path, bits: int, group_size: int, dtype: str) -> None:
    how = {"bits": bits, "group_size": group_size}
    tensors, plain = quantised((6, 256), getattr(mx, dtype), **how)
    with checkpoint_of(tmp_path, named("a", tensors), **how) as checkpoint:
        assert checkpoint.kind("a") == f"afq{6 if bits == 5 else bits}"
        record = checkpoint.layer("a").weight
        assert isinstance(record, AFQ)
        assert same_bits(record.dequantize(), plain)
        assert record.scales.dtype == tensors["scales"].dtype
        assert checkpoint.meta("a").weight.parts["w_q"].shape == record.parts["w_q"].shape
        for shard, of_plain in (
            (Shard.simple(0, 1, 3), plain[2:4]),
            (Shard.simple(1, 1, 2), plain[:, 128:]),
        ):
            assert same_bits(checkpoint.layer("a", shard).weight.dequantize(), of_plain)


def test_stacks_mixed_bits_and_what_is_left(tmp_path: Path) -> None:
    """Bits of single weights, weights that are not quantised, experts, biases of layers; MLX says everything twice."""
    experts, of_experts = quantised((3, 4, 64), bits=4, group_size=64)
    head, of_head = quantised((4, 64), bits=6, group_size=32)
    tensors = named("mlp.switch_mlp.up_proj", experts) | named("lm_head", head)
    tensors |= {"lm_head.bias": torch.arange(4.0), "mlp.gate.weight": torch.ones(3, 64)}
    said = {"bits": 4, "group_size": 64, "lm_head": {"bits": 6, "group_size": 32}, "mlp.gate": False}
    folder = write_checkpoint(tmp_path, tensors, quantization=said, quantization_config=said)
    with open_checkpoint(folder) as checkpoint:
        assert same_bits(checkpoint.layer("mlp.switch_mlp.up_proj").weight.dequantize(), of_experts)
        weight, bias = checkpoint.layer("lm_head")
        assert (weight.kind, weight.group_size, bias.tolist()) == ("afq6", 32, [0, 1, 2, 3])
        assert same_bits(weight.dequantize(), of_head)
        assert isinstance(checkpoint.layer("mlp.gate").weight, Unquant)


@pytest.mark.parametrize(("mode", "bits", "record"), [("mxfp4", 4, MXFP4), ("mxfp8", 8, ScaledFP8)])
def test_microscaling(tmp_path: Path, mode: str, bits: int, record: type[Any]) -> None:
    how = {"mode": mode, "bits": bits, "group_size": 32}
    try:
        tensors, plain = quantised((6, 128), **how)
    except (TypeError, ValueError):
        pytest.skip(f"this MLX has no {mode}")
    with checkpoint_of(tmp_path, named("a", tensors), **how) as checkpoint:
        weight = checkpoint.layer("a").weight
        assert isinstance(weight, record)
        assert type(checkpoint.meta("a").weight) is record
        assert same_bits(weight.dequantize(), plain)
        part = checkpoint.layer("a", Shard.offset(1, 32, 64)).weight
        assert same_bits(part.dequantize(), plain[:, 32:96])
        if record is MXFP4:
            serialize(weight)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"bits": 7}, r"unknown setting: expected one of 2, 3, 4.*got 7 .*quantization_config\.bits"),
        ({"bits": True}, r"got True .*quantization_config\.bits"),
        ({"group_size": 256}, r"expected one of 32, 64, 128, got 256 .*quantization_config\.group_size"),
        ({"mode": "nvfp4"}, r"expected one of affine, mxfp4, mxfp8, got nvfp4"),
        ({"lm_head": {"bits": 9}}, r"got 9 .*quantization_config\.lm_head\.bits"),
        ({"mode": "mxfp4", "group_size": 64}, r"expected one of 32, got 64"),
    ],
)
def test_settings_that_do_not_exist(tmp_path: Path, said: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        checkpoint_of(tmp_path, {"a.weight": torch.ones(2, 2)}, **{"bits": 4, "group_size": 64} | said)


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        (
            {"scales": None},
            MissingError,
            r"a companion.*tensor scales beside a\.weight, a\.biases .*layer a, field scales\)",
        ),
        ({"biases": None}, MissingError, r"tensor biases beside"),
        ({"scales": torch.ones(4, 2)}, ShapeError, r"wrong shape: expected \[4, 4\], got \[4, 2\] .*field a\.scales"),
        ({"biases": torch.ones(4, 4).half()}, FormatError, r"wrong dtype: expected F32, got F16 .*a\.biases"),
        ({"scales": torch.full((4, 4), torch.inf)}, FormatError, r"16 elements break a rule.*model\.safetensors"),
        ({"weight": torch.ones(4, 7).to(torch.uint32)}, FormatError, r"row is not whole groups.*got \[4, 7\]"),
    ],
)
def test_companions_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], problem: str
) -> None:
    tensors = quantised((4, 256), bits=4, group_size=64)[0] | changes
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with (
        checkpoint_of(tmp_path, named("a", present), bits=4, group_size=64) as checkpoint,
        pytest.raises(error, match=problem),
    ):
        checkpoint["a"]


def test_torch_is_not_needed(tmp_path: Path) -> None:
    import subprocess

    tensors, _ = quantised((64, 512), bits=4, group_size=64)
    folder = write_checkpoint(tmp_path, named("a", tensors), quantization={"bits": 4, "group_size": 64})
    code = "import sys, uqff; uqff.open_checkpoint(sys.argv[1])['a']; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
