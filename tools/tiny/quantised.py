"""Tiny checkpoints as other libraries quantise them: a plain one of `tools/tiny/models.py` in the layout of a method.

    python -m tools.tiny.quantised mlx PLAIN OUT

The codes come from the package's own quantisers; layouts and names are those of the libraries, which the tests of
`uqff/checkpoints` compare with the libraries themselves. Head and embedding stay as they are, but for MLX.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import torch
from safetensors.torch import load_file

from uqff.container.framing import build_header
from uqff.quantization.types import quantize

__all__ = ["METHODS", "save_tensors", "words", "write_quantised"]

Tensors = dict[str, torch.Tensor]


def _mlx(weight: torch.Tensor) -> Tensors:
    record: Any = quantize(weight, "afq4", group_size=32)
    return {".weight": record.w_q.view(torch.uint32), ".scales": record.scales, ".biases": record.biases}


def _mxfp4(weight: torch.Tensor) -> Tensors:
    record: Any = quantize(weight, "mxfp4")
    return {".weight": record.blocks, ".scales": record.scales}


def _fp8(weight: torch.Tensor) -> Tensors:
    record: Any = quantize(weight, "fp8")
    return {".weight": record.weight, ".weight_scale": record.dequant_w_scale.reshape(1)}


def _fp8_blocks(weight: torch.Tensor) -> Tensors:
    rows, columns = (-(-size // 32) for size in weight.shape)
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32)
            scales[row, column] = weight[block].float().abs().max() / 448
            codes[block] = (weight[block].float() / scales[row, column]).to(codes.dtype)
    return {".weight": codes, ".weight_scale_inv": scales}


def _hqq(weight: torch.Tensor) -> Tensors:
    record: Any = quantize(weight, "hqq4")
    numbers = {"nbits": 4, "group_size": 64, "axis": 0, "channel_wise": 1, "view_as_float": 0, "round_zero": 0}
    made = {".W_q": record.w_q, ".scale": record.scales, ".zero": record.zeros}
    made[".shape"] = torch.tensor(weight.shape)
    return made | {f".{name}": torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()}


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[out, in]`` of symmetric integers, zero is 8, and F16 scales of groups of 32 ``[out, groups]``."""
    groups = weight.float().unflatten(1, (-1, 32))
    scales = (groups.abs().amax(2) / 7.5).half().clamp(min=2**-14)
    codes = (groups / scales.float()[..., None]).round() + 8
    return codes.clamp(0, 15).flatten(1).to(torch.int64), scales


def words(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits ``[..., n]``, int64, as int32 words ``[..., n / 8]``, the first of each in the lowest bits."""
    return (codes.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def _gptq(weight: torch.Tensor) -> Tensors:
    codes, scales = _int4(weight)
    zeros = torch.full((scales.shape[1], scales.shape[0]), 7)
    index = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    return {".qweight": words(codes).T, ".qzeros": words(zeros), ".scales": scales.T, ".g_idx": index}


def _compressed_tensors(weight: torch.Tensor) -> Tensors:
    codes, scales = _int4(weight)
    shape = torch.tensor(weight.shape)
    return {".weight_packed": words(codes), ".weight_scale": scales, ".weight_shape": shape}


def _nf4(weight: torch.Tensor) -> Tensors:
    quantiles = torch.special.ndtri(torch.linspace(0.03, 0.97, 16))
    table, blocks = quantiles / quantiles.abs().max(), weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(1)
    codes = ((blocks / scales[:, None])[..., None] - table).abs().argmin(2).to(torch.uint8).reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        ".weight": codes[:, :1] << 4 | codes[:, 1:],
        ".weight.absmax": scales,
        ".weight.quant_map": table,
        ".weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
    }


METHODS: Final[dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]]] = {
    "mlx": (_mlx, {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}),
    "mxfp4": (_mxfp4, {"quantization_config": {"quant_method": "mxfp4"}}),
    "fp8": (_fp8, {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}),
    "fp8-blocks": (
        _fp8_blocks,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
    ),
    "hqq": (_hqq, {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}),
    "gptq": (_gptq, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}),
    "compressed-tensors": (
        _compressed_tensors,
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "ignore": ["lm_head"],
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
                },
            }
        },
    ),
    "nf4": (_nf4, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
}
"""How a matrix is stored, by the endings of its tensors' names, and what the configuration says, by method."""


DTYPES: Final = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint32": "U32",
    "bool": "BOOL",
}
"""What safetensors calls torch's dtypes."""


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file; releases of that library know not all of these dtypes."""
    headers = [
        (name, DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    header, order = build_header(headers)
    payloads = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in order)
    path.write_bytes(header + b"".join(payloads))


def write_quantised(method: str, source: Path, target: Path) -> Path:
    """Write a checkpoint of one file again, its matrices quantised."""
    make, said = METHODS[method]
    shutil.copytree(source, target)
    plain: Tensors = load_file(source / "model.safetensors")
    made: Tensors = {}
    for name, tensor in plain.items():
        if name.endswith("_proj.weight") or (method == "mlx" and tensor.dim() == 2):
            path = name.removesuffix(".weight")
            made |= {path + end: part.contiguous() for end, part in make(tensor).items()}
        else:
            made[name] = tensor
    save_tensors(made, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | said))
    return target


@click.command()
@click.argument("method", type=click.Choice(sorted(METHODS)))
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def main(method: str, source: Path, target: Path) -> None:
    """Write the checkpoint SOURCE into TARGET as METHOD has it."""
    write_quantised(method, source, target)


if __name__ == "__main__":
    main()
