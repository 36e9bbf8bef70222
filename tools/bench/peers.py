"""What other Python tools offer for the types of this format, on the CPU; a tool that is not installed offers nothing.

* gguf-py: its numpy quantisers and dequantisers of ggml types; it has no quantiser of a K type.
* MLX: affine groups (AFQ's arithmetic differs in rounding) and MXFP4, on its CPU backend.
* hqq: mobiusml's optimiser, which AFQ's cousin in the engine was taken from; up to 20 turns where the engine takes 10.
* torch: for FP8 the scaled cast to float8_e4m3fn; for Q8_0 its own int8 quantiser, one scale a row instead of a block,
  so less work.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from uqff.families import AFQ, FP8, GGUF, HQQ, QuantizedTensor, Unquant

__all__ = ["dequantisers", "quantisers"]

Task = Callable[[], object]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def quantisers(weight: torch.Tensor) -> dict[str, dict[str, Task]]:
    """Tasks that quantise a float32 weight: by type, then by tool."""
    peers: dict[str, dict[str, Task]] = {}
    for offered in (_torch, _gguf, _mlx, _hqq):
        for kind, (tool, task) in offered(weight).items():
            peers.setdefault(kind, {})[tool] = task
    return peers


def _torch(weight: torch.Tensor) -> dict[str, tuple[str, Task]]:
    def fp8() -> object:
        scale = torch.finfo(torch.float8_e4m3fn).max / weight.abs().max()
        return (weight * scale).to(torch.float8_e4m3fn), scale

    def int8() -> object:
        scales = weight.abs().amax(1).double() / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.quantize_per_channel(weight, scales, torch.zeros(len(weight)).long(), 0, torch.qint8)

    return {"fp8": ("torch", fp8), "q8_0": ("torch", int8)}


def _gguf(weight: torch.Tensor) -> dict[str, tuple[str, Task]]:
    if not _has("gguf"):
        return {}
    import gguf

    types = {kind: gguf.GGMLQuantizationType[kind.upper()] for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}
    return {kind: ("gguf-py", partial(gguf.quantize, weight.numpy(), each)) for kind, each in types.items()}


def _mlx(weight: torch.Tensor) -> dict[str, tuple[str, Task]]:
    if not _has("mlx"):
        return {}
    import mlx.core as mx

    array = mx.array(weight.numpy())

    def quantize(group: int, bits: int, mode: str) -> None:
        mx.eval(*mx.quantize(array, group, bits, mode=mode))

    tasks: dict[str, tuple[str, Task]] = {
        f"afq{bits}": ("MLX", partial(quantize, 64, bits, "affine")) for bits in (2, 3, 4, 6, 8)
    }
    return {**tasks, "mxfp4": ("MLX", partial(quantize, 32, 4, "mxfp4"))}


def _hqq(weight: torch.Tensor) -> dict[str, tuple[str, Task]]:
    if not _has("hqq"):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hqq.core.quantize import Quantizer

    def quantize(bits: int) -> object:
        return Quantizer.quantize(weight, nbits=bits, group_size=64, axis=0, device="cpu", compute_dtype=torch.float32)

    return {f"hqq{bits}": ("hqq", partial(quantize, bits)) for bits in (4, 8)}


def dequantisers(record: QuantizedTensor) -> dict[str, Task]:
    """Tasks that give the same weight as float32, in new memory unless the tool can write into a tensor: by tool."""
    tasks: dict[str, Task] = {}
    if isinstance(record, GGUF) and _has("gguf"):
        _add_gguf(record, tasks)
    if isinstance(record, AFQ) and _has("mlx"):
        import mlx.core as mx

        shape = (record.shape[0], -1)
        codes = mx.array(record.w_q.view(torch.uint32).view(shape).numpy())
        scales, biases = (mx.array(part.float().numpy()) for part in (record.scales, record.biases))
        tasks["MLX"] = lambda: mx.eval(mx.dequantize(codes, scales, biases, record.group_size, record.bits))
    if isinstance(record, HQQ) and record.axis == 0 and _has("hqq"):
        from hqq.core.quantize import Quantizer

        words = record.w_q.view(torch.int32) if record.bits == 3 else record.w_q
        meta = {
            "nbits": record.bits,
            "group_size": record.group_size,
            "shape": record.shape,
            "scale": record.scales,
            "zero": record.zeros,
            "axis": 0,
            "packing": Quantizer.bit_to_packing[record.bits],
            "view_as_float": False,
            "compute_dtype": torch.float32,
        }
        tasks["hqq"] = partial(Quantizer.dequantize, words, meta)
    if isinstance(record, FP8 | Unquant):
        stored = record.weight if isinstance(record, FP8) else record.data.view(torch.bfloat16).view(record.shape)
        out = torch.empty(record.shape)
        tasks["torch"] = partial(out.copy_, stored)
    return tasks


def _add_gguf(record: GGUF, tasks: dict[str, Task]) -> None:
    import gguf

    name, data = record.block_type.name, record.data.numpy()
    theirs: Any = getattr(gguf.GGMLQuantizationType, name.replace("K", "_K"), None)
    if theirs is None or name == "F32":  # of which gguf-py only makes a view
        return
    try:
        gguf.quants.dequantize(data[:1], theirs)
    except (NotImplementedError, KeyError):
        return
    tasks["gguf-py"] = partial(gguf.quants.dequantize, data, theirs)
