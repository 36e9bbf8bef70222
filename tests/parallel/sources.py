"""Weights of -1, 0 and 1 as every source stores them: products with them are exact, whoever adds up in what order."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.support.packed_weights import GroupedWeight
from tools.tiny.quantised import words
from uqff.numerics.packing import pack_planes

Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by their names, and what ``quantization_config`` says of them."""

ROWS, COLUMNS, GROUP = 2, 32, 32
"""Of a block in FP8; and of a group in MLX."""


def ternary(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of -1, 0 and 1."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def _powers(*shape: int) -> torch.Tensor:
    """Powers of two from 1/2 to 2, in an order of their own."""
    return 2.0 ** torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(len(shape)))


def _plain(path: str, weight: torch.Tensor) -> Stored:
    return {f"{path}.weight": weight.bfloat16()}, {}


def fp8_tensor(path: str, weight: torch.Tensor) -> Stored:
    """One scale."""
    return {
        f"{path}.weight": (weight * 2).to(torch.float8_e4m3fn),
        f"{path}.weight_scale": torch.tensor(0.5),
    }, {"quant_method": "fp8"}


def fp8_blocks(
    path: str, weight: torch.Tensor, *, name: str = "{}.weight", scale: str = "{}.weight_scale_inv"
) -> Stored:
    """A scale for each block of ``weight [..., out, in]``, tail blocks included."""
    *outer, out, columns = weight.shape
    scales = _powers(*outer, -(-out // ROWS), -(-columns // COLUMNS))
    wide = scales.repeat_interleave(ROWS, -2)[..., :out, :].repeat_interleave(COLUMNS, -1)[..., :columns]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS]}
    return {name.format(path): codes, scale.format(path): scales}, config


def mlx(path: str, weight: torch.Tensor) -> Stored:
    """Affine, four bits: codes 0, 1 and 2 of a group with scale 1, or 0, 2 and 4 of one with scale 1/2."""
    half = _powers(*weight.shape[:-1], weight.shape[-1] // GROUP).clamp(max=1)
    codes = ((weight + 1) / half.repeat_interleave(GROUP, -1)).to(torch.int64)
    return {
        f"{path}.weight": words(codes).view(torch.uint32),
        f"{path}.scales": half,
        f"{path}.biases": torch.full_like(half, -1),
    }, {"bits": 4, "group_size": GROUP}


def mxfp4(path: str, weight: torch.Tensor, *, codes: str = "{}.blocks", scales: str = "{}.scales") -> Stored:
    """Codes of 1 with exponent 127, or of 2 with exponent 126."""
    exponents = _powers(*weight.shape[:-1], weight.shape[-1] // 32).clamp(max=1)
    magnitudes = weight.abs() / exponents.repeat_interleave(32, -1)
    nibbles = (magnitudes * 2 + (weight < 0) * 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return {
        codes.format(path): nibbles[..., 0] | nibbles[..., 1] << 4,
        scales.format(path): (127 + exponents.log2()).to(torch.uint8),
    }, {"quant_method": "mxfp4"}


def gpt_oss(path: str, weight: torch.Tensor) -> Stored:
    """MXFP4 of stacked experts, a dimension for the blocks."""
    tensors, config = mxfp4(path, weight, codes="{}_blocks", scales="{}_scales")
    name = f"{path}_blocks"
    return tensors | {name: tensors[name].unflatten(-1, (-1, 16))}, config


def hqq(path: str, weight: torch.Tensor, *, axis: int = 1, size: int = 32) -> Stored:
    """Four bits, groups along the inputs or along the outputs, scale 1, zero 1."""
    groups = weight.numel() // size
    rows, ones = ((size, groups), (1, groups)) if axis == 0 else ((groups, size), (groups, 1))
    params = {
        "nbits": 4,
        "group_size": size,
        "axis": axis,
        "channel_wise": True,
        "round_zero": False,
        "view_as_float": False,
    }
    tensors = {
        "W_q": torch.from_numpy(pack_planes((weight + 1).to(torch.uint8).reshape(rows).numpy(), 4)),
        "scale": torch.ones(ones),
        "zero": torch.ones(ones),
        "shape": torch.tensor(list(weight.shape)),
        "nbits": torch.tensor(4, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(size, dtype=torch.int32),
        "packing": torch.tensor([ord(c) for c in "4bit_u8"], dtype=torch.uint8),
        "compute_dtype": torch.tensor([ord(c) for c in "torch.float32"], dtype=torch.uint8),
    }
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}, config


def hqq_columns(path: str, weight: torch.Tensor) -> Stored:
    """Groups that three ranks can share, too, if the weight has whole ones."""
    return hqq(path, weight, axis=0, size=32 if weight.numel() % 24 else 24)


def _grouped(weight: torch.Tensor, size: int) -> GroupedWeight:
    """Four bits, scale 1, zero 1."""
    out, columns = weight.shape
    groups = columns // size
    index = np.arange(columns) // size
    ones = np.ones((out, groups), np.int64)
    return GroupedWeight((weight + 1).to(torch.int64).numpy(), ones, torch.ones(out, groups).half(), index, 4)


def gptq(path: str, weight: torch.Tensor) -> Stored:
    """GPTQ whose groups are one after another: exact AFQ."""
    return _grouped(weight, GROUP).gptq(path), {"quant_method": "gptq", "bits": 4, "group_size": GROUP}


def gptq_order(path: str, weight: torch.Tensor) -> Stored:
    """GPTQ by ``desc_act``: which group an input belongs to is told for each."""
    made = _grouped(weight, GROUP)
    made.index = np.random.default_rng(1).permutation(made.index)
    return made.gptq(path), {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}


def awq(path: str, weight: torch.Tensor) -> Stored:
    """AWQ in its order of codes."""
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return _grouped(weight, GROUP).awq(path), config


def _of_compressed_tensors(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def compressed_tensors(path: str, weight: torch.Tensor) -> Stored:
    """Four bits by compressed-tensors: codes 7, 8 and 9 with a scale of 1, or 6, 8 and 10 with one of 1/2."""
    half = _powers(weight.shape[0], weight.shape[1] // GROUP).clamp(max=1)
    codes = (8 + weight / half.repeat_interleave(GROUP, 1)).to(torch.int64).unflatten(1, (-1, 8))
    words = (codes << torch.arange(0, 32, 4)).sum(2).to(torch.int32)
    tensors = {"weight_packed": words, "weight_scale": half, "weight_shape": torch.tensor(weight.shape)}
    config = _of_compressed_tensors("pack-quantized", num_bits=4, group_size=GROUP)
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}, config


def compressed_int8(path: str, weight: torch.Tensor) -> Stored:
    """Bytes with a scale for each row, of 1 or 1/2."""
    half = _powers(len(weight), 1).clamp(max=1)
    config = _of_compressed_tensors("int-quantized", num_bits=8, strategy="channel")
    return {f"{path}.weight": (weight / half).to(torch.int8), f"{path}.weight_scale": half}, config


def compressed_float(path: str, weight: torch.Tensor, *, strategy: str = "tensor") -> Stored:
    """FP8 with one scale, or one for each row."""
    scales = torch.tensor([0.5]) if strategy == "tensor" else _powers(len(weight), 1)
    config = _of_compressed_tensors("float-quantized", num_bits=8, type="float", strategy=strategy)
    return {f"{path}.weight": (weight / scales).to(torch.float8_e4m3fn), f"{path}.weight_scale": scales}, config


def nvfp4(path: str, weight: torch.Tensor) -> Stored:
    """Codes of 1 with a scale of 1, or of 2 with one of 1/2; the global scale doubles both."""
    half = _powers(len(weight), weight.shape[1] // 16).clamp(max=1)
    magnitudes = weight.abs() / half.repeat_interleave(16, 1)
    nibbles = (magnitudes * 2 + (weight < 0) * 8).to(torch.uint8).unflatten(-1, (-1, 2))
    tensors = {
        "weight_packed": nibbles[..., 0] | nibbles[..., 1] << 4,
        "weight_scale": (2 * half).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([2.0]),
    }
    config = _of_compressed_tensors(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}, config


def nf4(path: str, weight: torch.Tensor, *, name: str = "nf4") -> Stored:
    """Bitsandbytes' four bits with a table of our own, in which -1, 0 and 1 are; blocks of 32."""
    table = torch.linspace(-1, 0.875, 16)
    table[15] = 1
    scales = torch.ones(weight.numel() // 32)
    codes = torch.tensor([0, 8, 15], dtype=torch.uint8)[(weight + 1).long()].reshape(-1, 2)
    state = {"quant_type": name, "blocksize": 32, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {
        "weight": codes[:, :1] << 4 | codes[:, 1:],
        "weight.absmax": scales,
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{name}": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
    }
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}, {"quant_method": "bitsandbytes"}


def int8(path: str, weight: torch.Tensor) -> Stored:
    """LLM.int8 of bitsandbytes: 127 is the largest magnitude of a row."""
    tensors = {f"{path}.weight": (weight * 127).to(torch.int8), f"{path}.SCB": torch.ones(len(weight))}
    return tensors, {"quant_method": "bitsandbytes"}


MATRICES: dict[str, Callable[[str, torch.Tensor], Stored]] = {
    "plain": _plain,
    "fp8": fp8_tensor,
    "fp8-block": fp8_blocks,
    "mlx": mlx,
    "mxfp4": mxfp4,
    "hqq": hqq,
    "hqq-columns": hqq_columns,
    "gptq": gptq,
    "gptq-order": gptq_order,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "compressed-int8": compressed_int8,
    "compressed-fp8": compressed_float,
    "compressed-fp8-rows": partial(compressed_float, strategy="channel"),
    "nvfp4": nvfp4,
    "nf4": nf4,
    "fp4": partial(nf4, name="fp4"),
    "int8": int8,
}
"""How a source stores a matrix."""

NUMBERS = ("weight_scale", "weight_scale_inv", "scales", "biases", "scale", "absmax", "SCB")
"""Last parts of the names of what multiplies codes."""


def doubled(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Twice the weight, by its scales alone; or by its numbers, if it has none."""
    made, plain = dict(stored), len(stored) == 1
    for name, tensor in stored.items():
        end = name.rpartition(".")[2]
        if end == "weight_global_scale":  # which divides
            made[name] = tensor / 2
        elif plain or (end in NUMBERS and tensor.dtype not in (torch.uint8, torch.float8_e4m3fn)):
            made[name] = tensor * 2
        elif end == "scales":  # exponents
            made[name] = tensor + 1
    return made
