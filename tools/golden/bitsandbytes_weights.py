"""Weights as bitsandbytes stores them, and what it makes of them in float32: one file for the tests.

pip install bitsandbytes==0.50.2
python -m tools.golden.bitsandbytes_weights OUT.safetensors
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from safetensors.torch import save_file

CASES = {
    "nf4": ("nf4", False, 64, (8, 128)),
    "nf4-nested": ("nf4", True, 64, (12, 1600)),
    "nf4-across-rows": ("nf4", True, 64, (6, 96)),
    "fp4": ("fp4", False, 32, (8, 64)),
    "fp4-nested": ("fp4", True, 64, (4, 40)),
}
"""Type, nested or not, block, shape."""


def main(out: str) -> None:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    draw, made = torch.Generator().manual_seed(1), {}
    for name, (kind, nested, block, shape) in CASES.items():
        weight = torch.randn(shape, generator=draw)
        codes, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
        made[f"{name}.weight"], made[f"{name}.numbers"] = codes, functional.dequantize_4bit(codes, state)
        made |= {f"{name}.weight.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn((8, 48), generator=draw).half())
    made |= {"int8.weight": codes, "int8.SCB": scales, "int8.weight_format": torch.zeros((), dtype=torch.uint8)}
    made["int8.numbers"] = functional.int8_vectorwise_dequant(codes, scales)
    save_file(made, out)


if __name__ == "__main__":
    main(sys.argv[1])
