"""Weights that auto-round packs and AutoAWQ unpacks, and what these make of them in float32: one file for the tests.

    pip download --no-deps auto-round==0.8.0 autoawq==0.2.9, both unpacked into FOLDER
    python -m tools.golden.grouped_weights FOLDER OUT.safetensors

auto-round's two layers are those of GPTQ's two conventions of zeros. Only the modules that pack and unpack are taken:
the packages around them ask for a GPU and for models, so that empty ones stand in for them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

CASES: dict[str, tuple[str, int, int, tuple[int, int]]] = {
    "gptq2": ("gptq", 2, 32, (32, 64)),
    "gptq3": ("gptq", 3, 32, (32, 96)),
    "gptq4": ("gptq", 4, 64, (32, 128)),
    "gptq8": ("gptq", 8, 32, (32, 32)),
    "gptq_v2-2": ("gptq_v2", 2, 64, (32, 64)),
    "gptq_v2-3": ("gptq_v2", 3, 32, (32, 64)),
    "gptq_v2-4": ("gptq_v2", 4, 32, (32, 64)),
    "gptq_v2-8": ("gptq_v2", 8, 32, (32, 32)),
    "awq": ("awq", 4, 32, (32, 64)),
}
"""Method, bits, group, outputs and inputs."""


def load(folder: Path, path: str) -> ModuleType:
    """One module of a package, by its file."""
    file = next(folder.rglob(path))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path, out: str) -> None:
    utils: Any = ModuleType("auto_round.utils")
    utils._get_packing_device = lambda device: torch.device("cpu")
    sys.modules |= {"auto_round": ModuleType("auto_round"), "auto_round.utils": utils}
    packers: dict[str, Any] = {
        "gptq": load(folder, "auto_round_extension/torch/qlinear_torch_zp.py"),
        "gptq_v2": load(folder, "auto_round_extension/torch/qlinear_torch.py"),
    }
    packing: Any = load(folder, "awq/utils/packing_utils.py")
    draw, made = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for name, (method, bits, size, (rows, columns)) in CASES.items():
        scales = (torch.rand((rows, columns // size), generator=draw) + 0.1).half().float()
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw)
        zeros = torch.randint(int(method == "gptq"), 1 << bits, scales.shape, generator=draw).float()
        if method == "awq":
            # AutoAWQ's packer asks for a GPU: the words are packed here, in its order, and unpacked by it
            order = torch.tensor(packing.AWQ_ORDER)
            shifts = torch.arange(0, 32, 4)

            def words(numbers: torch.Tensor, order: torch.Tensor = order, shifts: torch.Tensor = shifts) -> Any:
                return (numbers.T.long().unflatten(1, (-1, 8))[..., order] << shifts).sum(-1).to(torch.int32)

            parts = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.T.contiguous().half()}
            numbers = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, size).T
        else:
            linear = torch.nn.Linear(columns, rows, bias=False)
            linear.weight.data = scales.repeat_interleave(size, 1) * (codes - zeros.repeat_interleave(size, 1))
            packer = packers[method].QuantLinear(bits, size, columns, rows, bias=False)
            packer.device = torch.device("cpu")
            packer.pack(linear, scales, zeros)
            parts = {each: getattr(packer, each).clone() for each in ("qweight", "qzeros", "scales")}
            packer.scales = packer.scales.float()
            numbers = packer(torch.eye(columns)).T
        made |= {f"{name}.{key}": part for key, part in parts.items()} | {f"{name}.numbers": numbers.detach()}
    save_file({name: tensor.contiguous().clone() for name, tensor in made.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
