"""HQQ checkpoints: made by ``hqq`` itself where it is installed, else in its layout of codes that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint_of
from uqff import FormatError, MissingError, ShapeError, UnsupportedError, serialize
from uqff.families import HQQ
from uqff.numerics.packing import pack_planes

PARAMS = {"nbits": 4, "group_size": 64, "axis": 0, "channel_wise": True, "round_zero": False, "view_as_float": False}


def config(**params: Any) -> dict[str, Any]:
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": PARAMS | params}}


def by_hand(bits: int, axis: int, group: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of codes ``[8, 80]`` that are known, and their numbers."""
    groups = 8 * 80 // group
    shape = (group, groups) if axis == 0 else (groups, group)
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    of_groups = (1, groups) if axis == 0 else (groups, 1)
    scale, zero = torch.rand(of_groups, generator=generator), torch.rand(of_groups, generator=generator) * 3
    tensors = {
        "W_q": torch.from_numpy(pack_planes(q.numpy(), bits)),
        "scale": scale.half(),
        "zero": zero.half(),
        "shape": torch.tensor([8, 80]),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "packing": torch.tensor([ord(c) for c in f"{bits}bit_{32 if bits == 3 else 'u8'}"], dtype=torch.uint8),
        "compute_dtype": torch.tensor([ord(c) for c in "torch.float16"], dtype=torch.uint8),
        "bias": torch.ones(8),
    }
    plain = ((q.float() - zero.half().float()) * scale.half().float()).view(8, 80)
    return {f"a.{name}": tensor for name, tensor in tensors.items()}, plain


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_that_are_known(tmp_path: Path, bits: int, axis: int) -> None:
    tensors, plain = by_hand(bits, axis, 80 if axis else 64)
    if axis and 8 % {1: 8, 2: 4, 3: 1, 4: 2, 8: 1}[bits]:
        pytest.skip("rows do not pack")
    with checkpoint_of(tmp_path, tensors, **config()) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert (checkpoint.kind("a"), checkpoint.shape("a")) == (f"hqq{bits}", (8, 80))
        record = checkpoint.layer("a").weight
        assert isinstance(record, HQQ)
        assert torch.equal(record.dequantize(), plain)
        serialize(checkpoint.layer("a"))


def test_bytes_viewed_as_floats_and_settings_of_the_configuration(tmp_path: Path) -> None:
    tensors, plain = by_hand(4, 0)
    tensors["a.W_q"] = tensors["a.W_q"].view(torch.float16)
    for name in ("nbits", "axis", "group_size", "packing"):
        del tensors[f"a.{name}"]
    with checkpoint_of(tmp_path, tensors, **config(view_as_float=True)) as checkpoint:
        assert torch.equal(checkpoint.layer("a").weight.dequantize(), plain)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("how", [{}, {"group_size": None}, {"channel_wise": False, "optimize": False}])
def test_against_hqq(tmp_path: Path, bits: float, axis: int, how: dict[str, Any]) -> None:
    """Bit for bit what it dequantises in float32."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed: it needs accelerate")
    from hqq.core.utils import encode_safetensor_type

    if bits == 3 and how:
        pytest.skip("hqq cannot read these itself")

    weight = torch.randn(16, 160, generator=torch.Generator().manual_seed(1))
    params = PARAMS | {"nbits": bits, "axis": axis, "group_size": 64, "optimize": True} | how
    codes, meta = quantize.Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, **params)
    plain = quantize.Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    state = {"W_q": codes, **{name: encode_safetensor_type(value) for name, value in meta.items()}}
    tensors = {f"a.{name}": value for name, value in state.items() if value is not None}
    with checkpoint_of(tmp_path, tensors, **config(**how)) as checkpoint:
        assert torch.equal(checkpoint.layer("a").weight.dequantize(), plain)


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"scale": None}, MissingError, r"tensor scale beside a\.W_q"),
        ({"shape": None}, MissingError, r"tensor shape beside a\.W_q"),
        ({"shape": torch.tensor([8, 0])}, ShapeError, r"not a shape.*got \[8, 0\] .*a\.shape"),
        ({"nbits": torch.tensor(7)}, UnsupportedError, r"expected 8, 6, .*got 7 .*nbits"),
        ({"axis": torch.tensor(2)}, UnsupportedError, r"expected 0 or 1, got 2"),
        ({"group_size": torch.tensor(63)}, FormatError, r"weight is not whole groups: expected a divisor of 640"),
        ({"group_size": torch.tensor(32)}, ShapeError, r"wrong shape: expected 20 numbers, one a group"),
        ({"W_q": torch.ones(32, 11).byte()}, ShapeError, r"codes do not fit.*expected 320 bytes, \[32, 10\]"),
        ({"W_q": torch.ones(32, 10)}, FormatError, r"wrong dtype: expected U8 or I32, got F32"),
        ({"zero": torch.full((1, 10), torch.nan).half()}, FormatError, r"10 elements break a rule.*a\.zero"),
        ({"zero": torch.ones(1, 10)}, FormatError, r"wrong dtype: expected F16, got F32"),
        ({"packing": torch.tensor([*b"3bit_32"]).byte()}, FormatError, r"wrong packing: expected 4bit_u8, got 3bit_32"),
        ({"quant_zero": torch.tensor(1).byte()}, UnsupportedError, r"scales that are quantised themselves"),
    ],
)
def test_companions_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], problem: str
) -> None:
    tensors = by_hand(4, 0)[0] | {f"a.{name}": tensor for name, tensor in changes.items()}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with checkpoint_of(tmp_path, present, **config()) as checkpoint, pytest.raises(error, match=problem):
        checkpoint["a"]
