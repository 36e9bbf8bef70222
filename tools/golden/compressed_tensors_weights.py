"""Weights as compressed-tensors packs them, and what it makes of them: one file for the tests.

    pip install compressed-tensors==0.20.0
    python -m tools.golden.compressed_tensors_weights OUT.safetensors

Scales are F32 and short, so that the library's arithmetic, which is that of the scales' dtype, is float32.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from safetensors.torch import save_file

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "int4": ("pack-quantized", INT4, (8, 128)),
    "int4-zeros": ("pack-quantized", INT4 | {"symmetric": False}, (12, 128)),
    "int4-channel": ("pack-quantized", INT4 | {"strategy": "channel", "group_size": None}, (8, 96)),
    "int8": ("pack-quantized", INT4 | {"num_bits": 8, "group_size": 64}, (8, 128)),
    "int3-zeros": ("pack-quantized", INT4 | {"num_bits": 3, "symmetric": False}, (20, 64)),
    "int8-plain": ("int-quantized", INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}, (8, 64)),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}, (8, 32)),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (8, 32)),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        (6, 64),
    ),
}
"""Format, arguments of the weights, shape."""


def main(out: str) -> None:
    base: Any = importlib.import_module("compressed_tensors.compressors.base")
    importlib.import_module("compressed_tensors.compressors")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    draw = torch.Generator().manual_seed(1)
    made: dict[str, torch.Tensor] = {}
    for name, (form, arguments, (rows, columns)) in CASES.items():
        args = quantization.QuantizationArgs(**arguments)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        groups = columns // args.group_size if args.group_size else 1
        count = (1,) if arguments["strategy"] == "tensor" else (rows, groups)
        scale = (torch.rand(count, generator=draw) + 0.1).half().float()
        state = {"weight": torch.randn((rows, columns), generator=draw) * 5, "weight_scale": scale}
        if not args.symmetric:
            half = 1 << (args.num_bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, count, generator=draw, dtype=torch.int8)
        if name == "nvfp4":
            state["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
            state["weight_global_scale"] = torch.tensor([3.7])
        compressor = base.BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        numbers = compressor.decompress(dict(packed), scheme)["weight"]
        made |= {f"{name}.{key}": part for key, part in packed.items()} | {f"{name}.numbers": numbers}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in made.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1])
