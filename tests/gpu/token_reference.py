"""What the kernels of ``uqff/gpu/token.cu`` do, by torch operations, as ``transformers`` has them."""

from __future__ import annotations

import torch

__all__ = ["Attention", "add_norm", "gate"]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two rows, and its norm."""
    total = x if y is None else x + y
    return total, _norm(total, weight, eps)


def gate(gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    """``SiLU(gates) · ups``."""
    return torch.nn.functional.silu(gates) * ups


class Attention:
    """Attention of one token at a time; the arguments are those of :class:`uqff.gpu.token.Attention`."""

    def __init__(self, heads: int, head: int, like: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._heads, self._head, self._cos, self._sin = heads, head, cos, sin

    def _turned(self, row: torch.Tensor, at: int) -> torch.Tensor:
        lo, hi = row.chunk(2, -1)
        return row * self._cos[at] + torch.cat((-hi, lo), -1) * self._sin[at]

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        eps: float,
    ) -> torch.Tensor:
        """The cache is changed; sums are float32."""
        at = int(position)
        q, k, v = (each.reshape(-1, self._head) for each in (q, k, v))
        if norms is not None:
            q, k = _norm(q, norms[0], eps), _norm(k, norms[1], eps)
        q, k = self._turned(q, at), self._turned(k, at)
        keys[0, :, at], values[0, :, at] = k, v
        group = self._heads // keys.shape[1]
        seen_keys, seen = (each[0, :, : at + 1].float().repeat_interleave(group, 0) for each in (keys, values))
        scores = torch.einsum("hd,htd->ht", q.float() * scale, seen_keys).softmax(-1)
        return torch.einsum("ht,htd->hd", scores, seen).to(q.dtype).view(1, 1, -1)
