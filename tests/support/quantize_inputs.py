"""Weights on which a fast quantiser could part from its reference: each kind once, small, always the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def weights(rows: int = 6, columns: int = 384) -> dict[str, F32]:
    """Finite float32 matrices by name; columns are a multiple of 128."""
    rng = np.random.default_rng(1)
    shape = (rows, columns)
    count = rows * columns
    normal = rng.standard_normal(shape, dtype=np.float32)
    blocks = (count // 32, 32)
    powers = np.exp2(rng.integers(-126, 122, (count // 32, 1)).astype(np.float64)).astype(np.float32)
    below = (powers.view(np.int32) - rng.integers(0, 60, powers.shape)).astype(np.int32).view(np.float32)
    bits = rng.integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)
    kinds: dict[str, Any] = {
        "normal": normal * np.float32(0.02),
        "unit": normal,
        "heavy tails": rng.standard_cauchy(shape) * 0.1,
        "wide": normal * np.float32(10),
        "offset": normal * np.float32(1e-4) + np.float32(3),
        "constant per 64": np.repeat(rng.standard_normal(count // 64), 64),
        "zeros": np.where(rng.random(shape) < 0.5, 0.0, -0.0),
        "negative zeros": np.full(shape, -0.0),
        "not negative": np.where(normal > 0, normal, -0.0),
        "sparse": np.where(rng.random(shape) < 0.03, normal, 0),
        "ties": rng.integers(-8, 9, shape) * 0.125,
        "subnormal": (normal * np.float32(1e-20)) * np.float32(1e-20),
        "few smallest": rng.integers(-3, 4, shape) * 1e-45,
        "tiny": normal * np.float32(1e-36),
        "huge": normal * np.float32(1e29),
        "largest": rng.choice(np.array([3.4028235e38, -3.4028235e38, 1e38, 0]), shape),
        "every scale": normal.reshape(blocks) * np.exp2(rng.integers(-130, 120, (count // 32, 1))),
        "magnitudes just below powers of two times 6": rng.uniform(-1, 1, blocks) * (below.astype(np.float64) * 6),
        "any bits": np.where(np.isfinite(bits), bits, 1),
    }
    result = {name: np.asarray(values, np.float32).reshape(shape) for name, values in kinds.items()}
    # The largest of each block exactly at the limit.
    limits = result["magnitudes just below powers of two times 6"].reshape(blocks)
    limits[:, 5] = (below.astype(np.float64) * 6).astype(np.float32)[:, 0]
    return result


def assert_same(ours: Any, expected: Any, what: str) -> None:
    """Same shape, dtype and bytes; for tuples, of each part."""
    if isinstance(expected, tuple):
        assert len(ours) == len(expected), what
        for part, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert_same(a, b, f"{what}, part {part}")
        return
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype), what
    assert ours.tobytes() == expected.tobytes(), what
