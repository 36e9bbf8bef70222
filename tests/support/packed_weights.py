"""Weights as GPTQ and AWQ pack them, from codes, zeros and scales that are known; packed by Python's integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["GroupedWeight", "packed_words"]

Integers = npt.NDArray[Any]

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_words(codes: Integers, bits: int) -> Integers:
    """``[rows, n]`` codes as int32 words: each row one number, its first code in the lowest bits, zeros at its end."""
    made = []
    for row in codes.tolist():
        number = sum(code << bits * at for at, code in enumerate(row))
        made.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), "<i4"))
    return np.stack(made)


@dataclass
class GroupedWeight:
    """What a quantiser decides."""

    codes: Integers  # [out, in]
    zeros: Integers  # [out, groups]
    scales: torch.Tensor  # [out, groups]
    index: Integers  # [in]
    bits: int

    @classmethod
    def random(cls, out: int, columns: int, bits: int, size: int, dtype: torch.dtype, seed: int = 0) -> GroupedWeight:
        draw = np.random.default_rng(seed)
        groups = -(-columns // size)
        scales = torch.from_numpy(draw.uniform(0.001, 3, (out, groups)).astype(np.float32)).to(dtype)
        return cls(
            draw.integers(0, 1 << bits, (out, columns)),
            draw.integers(0, 1 << bits, (out, groups)),
            scales,
            np.arange(columns) // size,
            bits,
        )

    def numbers(self) -> torch.Tensor:
        """The formula of both in float32."""
        index = torch.from_numpy(self.index)
        differences = torch.from_numpy(self.codes).float() - torch.from_numpy(self.zeros).float()[:, index]
        return self.scales.float()[:, index] * differences

    def gptq(self, path: str, *, v2: bool = False, g_idx: bool = True) -> dict[str, torch.Tensor]:
        zeros = self.zeros if v2 else (self.zeros - 1) % (1 << self.bits)
        made = {
            "qweight": torch.from_numpy(packed_words(self.codes, self.bits).T.copy()),
            "qzeros": torch.from_numpy(packed_words(zeros.T, self.bits)),
            "scales": self.scales.T.contiguous(),
        }
        if g_idx:
            made["g_idx"] = torch.from_numpy(self.index.astype(np.int32))
        return {f"{path}.{name}": tensor for name, tensor in made.items()}

    def awq(self, path: str) -> dict[str, torch.Tensor]:
        made = {"scales": self.scales.T.contiguous()}
        for name, codes in (("qweight", self.codes), ("qzeros", self.zeros)):
            shuffled = codes.T.reshape(codes.shape[1], -1, 8)[..., AWQ_COLUMNS].reshape(codes.shape[1], -1)
            made[name] = torch.from_numpy(packed_words(shuffled, 4))
        return {f"{path}.{name}": tensor for name, tensor in made.items()}
