"""The checkpoints that client and package both quantise, for `tools/interop`.

Between them: in-dims that are multiples of 256, of 64, of 32 and of neither; tied and untied; with biases and without;
every pair of a stored and a load dtype that matters; ordinary weights, outliers, the rows that quantisers treat
specially, and weights spread over 24 binary orders of magnitude, also where scales overflow or underflow.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tools.tiny.models import Float32, TinyModel, round_to

ORDERS = 24
"""Binary orders of magnitude over which `WideModel` spreads its weights."""


@dataclasses.dataclass(frozen=True)
class WideModel(TinyModel):
    """A tiny checkpoint whose projections have weights of very different size side by side.

    Every weight is multiplied by a power of two, drawn per weight in one row and per row in the next. In every eighth
    row all but one weight are zero; of those rows, all have it in another place, and every other one is negative.
    """

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Float32:
        values = super()._tensor(name, shape)
        if "_proj" not in name or not name.endswith("weight"):
            return values
        rng = np.random.default_rng([self.seed, len(name), *shape])
        draws = rng.bit_generator.random_raw(values.size).reshape(shape) % np.uint64(ORDERS)
        exponents = draws.astype(np.int32) - ORDERS // 2
        exponents[1::2] = exponents[1::2, :1]
        wide = np.ldexp(values, exponents)
        for row in range(0, shape[0], 8):
            spike = np.float32(2 if row % 16 else -2)
            wide[row] = np.where(np.arange(shape[1]) == row % shape[1], spike, np.float32(0))
        return round_to(wide, self.weight_dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint and the dtype in which it is loaded. `reference`: quantise it with the reference paths as well."""

    name: str
    model: TinyModel
    dtype: str
    reference: bool = False


CASES = (
    Case("llama", TinyModel("llama", hidden_size=512, intermediate_size=256, layers=2, seed=41), "F32"),
    Case(
        "qwen2 bf16",
        TinyModel("qwen2", intermediate_size=512, tied=True, weight_dtype="BF16", seed=42),
        "BF16",
    ),
    Case("qwen2 f16, 320", TinyModel("qwen2", intermediate_size=320, std=0.05, seed=43), "F16"),
    Case(
        "llama edges",
        TinyModel("llama", intermediate_size=256, vocab_size=32, edge_rows=True, seed=44),
        "F32",
        reference=True,
    ),
    Case("llama edges f16", TinyModel("llama", intermediate_size=256, edge_rows=True, seed=45), "F16"),
    Case("qwen2 edges bf16", TinyModel("qwen2", intermediate_size=256, edge_rows=True, seed=46), "BF16"),
    Case("llama outliers", TinyModel("llama", intermediate_size=256, std=0.3, outliers=0.02, seed=47), "F32"),
    Case(
        "qwen2 outliers f16",
        TinyModel("qwen2", intermediate_size=256, std=0.1, outliers=0.1, weight_dtype="F16", seed=48),
        "F16",
    ),
    Case("llama wide", WideModel("llama", intermediate_size=256, std=0.5, seed=49), "F32"),
    Case("llama huge", WideModel("llama", intermediate_size=256, vocab_size=32, std=1e12, seed=55), "F32"),
    Case("llama tiny", WideModel("llama", intermediate_size=256, vocab_size=32, std=1e-38, seed=56), "F32"),
    Case("qwen2 wide bf16", WideModel("qwen2", intermediate_size=256, std=0.5, tied=True, seed=50), "BF16"),
    Case(
        "qwen2 128",
        TinyModel("qwen2", hidden_size=128, intermediate_size=192, edge_rows=True, weight_dtype="BF16", seed=51),
        "F32",
    ),
    Case("llama 96", WideModel("llama", hidden_size=96, intermediate_size=160, heads=3, tied=True, seed=52), "F32"),
    Case("qwen2 80 bf16", TinyModel("qwen2", hidden_size=80, intermediate_size=48, heads=5, seed=53), "BF16"),
    Case("qwen2 40", WideModel("qwen2", hidden_size=40, intermediate_size=24, heads=2, vocab_size=33, seed=54), "F32"),
)
