"""What a decoder does with one token beside its products, by kernels: norms, attention over a cache, gates.

Each is what transformers does with one row, rounded where it rounds; ``token.cu`` has the formulas.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import TYPE_CHECKING, Final

from uqff.codes import DType
from uqff.gpu import compiling, driver
from uqff.gpu.source import PRIMITIVES, token_source

if TYPE_CHECKING:
    import torch

__all__ = ["Attend", "Attention", "Gated", "Norm", "add_norm", "fits_attention", "fits_norm", "gate", "kernel_of"]

THREADS: Final = 256
NORM_THREADS: Final = 512
"""As ``token.cu`` has it."""
WIDEST_NORM: Final = 4 * 8 * NORM_THREADS
CHUNK: Final = 64
"""Positions that a block goes through, at least."""
CHUNKS: Final = 32
"""Blocks that share a head, at most."""
NUMBERS: Final = 1024
"""Numbers of heads that a block has, at most: they are in registers."""


class Norm(ctypes.Structure):
    """``Norm`` of ``token.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "weight", "sum", "out")),
        ("width", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


class Gated(ctypes.Structure):
    """``Gated`` of ``token.cu``."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("gate", "up", "out")), ("width", ctypes.c_int))


class Attend(ctypes.Structure):
    """``Attend`` of ``token.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "q_norm", "k_norm", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "position", "out", "partial", "done")),
        *((name, ctypes.c_int) for name in ("tokens", "chunk", "blocks_of_head")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
    )


def fits_norm(width: int) -> bool:
    """Whether there is a kernel for norms over so many numbers."""
    return width % 4 == 0 and 0 < width <= WIDEST_NORM


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two rows, and its RMS norm.

    Args:
        x: ``[..., width]`` of one row, contiguous, of the dtype of all.
        y: of the same shape; if None, the sum is ``x`` itself.
        weight: ``[width]``.
        eps: what is added to the mean of squares.
    """
    total, out = x if y is None else x.new_empty(x.shape), x.new_empty(x.shape)
    given = (x.data_ptr(), _address(y), weight.data_ptr(), total.data_ptr(), out.data_ptr(), x.shape[-1], eps)
    kernel = _kernel("add_norm", "Norm", NORM_THREADS, _known(x.dtype), (), x.device.index)
    kernel.launch((1, 1), NORM_THREADS, Norm(*given))
    return total, out


def gate(gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    """``SiLU(gates) · ups`` of one row each, whose width is a multiple of 4."""
    out, width = gates.new_empty(gates.shape), gates.shape[-1]
    gated = Gated(gates.data_ptr(), ups.data_ptr(), out.data_ptr(), width)
    blocks = math.ceil(width / 4 / THREADS)
    kernel = _kernel("silu_gate", "Gated", THREADS, _known(gates.dtype), (), gates.device.index)
    kernel.launch((blocks, 1), THREADS, gated)
    return out


class Attention:
    """Attention of one token at a time, over caches of one shape."""

    def __init__(self, heads: int, head: int, like: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Room for what blocks pass on.

        Args:
            heads: of the queries.
            head: numbers of each.
            like: keys of a layer, ``[1, heads of keys, tokens, head]``.
            cos: of the angles of all positions, ``[tokens, head]``, contiguous, in the dtype of the model.
            sin: likewise.
        """
        import torch

        self._kv_heads, self._tokens = like.shape[1], like.shape[2]
        self._heads, self._head, self._cos, self._sin = heads, head, cos, sin
        self._group = heads_of_a_block(heads // self._kv_heads, head)
        self._chunk = max(CHUNK, math.ceil(self._tokens / CHUNKS))
        self._grid = heads // self._group, math.ceil(self._tokens / self._chunk)
        room = self._grid[0] * self._grid[1] * self._group * (head + 2)
        self._partial = torch.empty(room, dtype=torch.float32, device=like.device)
        self._done = torch.zeros(self._grid[0], dtype=torch.int32, device=like.device)
        self._dtype = _known(like.dtype)

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
        """Put the token's key and value into the cache and attend to all that is there.

        Args:
            q: ``[heads · head]``, contiguous; not yet rotated.
            k: of the heads of keys, likewise.
            v: likewise.
            keys: ``[1, heads of keys, tokens, head]``; changed.
            values: likewise.
            position: of the token, int64 ``[1]``.
            norms: weights of norms over each head of queries and of keys, if there are any.
            scale: of the products of queries and keys.
            eps: of the norms.

        Returns:
            ``[1, 1, heads · head]``.
        """
        out = q.new_empty(1, 1, self._heads * self._head)
        attend = Attend(
            *(each.data_ptr() for each in (q, k, v)),
            *(_address(norms and norms[i]) for i in range(2)),
            *(each.data_ptr() for each in (self._cos, self._sin, keys, values, position, out)),
            *(each.data_ptr() for each in (self._partial, self._done)),
            *(self._tokens, self._chunk, self._grid[0] // self._kv_heads),
            *(scale, eps),
        )
        how = (self._head, self._group)
        _kernel("attend", "Attend", THREADS, self._dtype, how, q.device.index).launch(self._grid, THREADS, attend)
        return out


def heads_of_a_block(group: int, head: int) -> int:
    """How many of the query heads that share a key head one block has."""
    return max(each for each in range(1, group + 1) if group % each == 0 and each * head <= max(NUMBERS, head))


def fits_attention(heads: int, kv_heads: int, head: int) -> bool:
    """Whether there is a kernel for heads of such a size."""
    return head in (32, 64, 96, 128, 256) and kv_heads > 0 and heads % kv_heads == 0


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _known(dtype: torch.dtype) -> DType:
    found = DType.of_torch(dtype)
    assert found is not None
    return found


@cache
def _kernel(name: str, given: str, threads: int, dtype: DType, how: tuple[int, ...], index: int) -> driver.Kernel:
    return kernel_of(token_source(name, given, threads, dtype, how), name, dtype, index)


def kernel_of(source: str, name: str, dtype: DType, index: int) -> driver.Kernel:
    """The function ``uqff_name`` of a source.

    Args:
        source: without the primitives.
        name: of the function.
        dtype: that it is for, for the log.
        index: of the device.
    """
    import torch

    compiling.LOGGER.info("compiling %s of %s for the GPU", name, dtype.name)
    with torch.cuda.device(index):
        code = compiling.compiled(PRIMITIVES.read_text() + source, torch.cuda.get_device_capability(index))
        return driver.load(code, torch.device("cuda", index), f"uqff_{name}")
