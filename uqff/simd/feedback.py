"""Error feedback within a block of inputs, as a kernel equal to :func:`uqff.numerics.feedback.round_inputs`."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from uqff.simd.compiling import kernel

__all__ = ["round_inputs"]


@kernel
def round_inputs(x, factor, offset, step, values, codes, errors, lo, hi):
    """Rows [lo, hi) of :func:`uqff.numerics.feedback.round_inputs`."""
    n, last = x.shape[1], len(values) - 1
    for row in range(lo, hi):
        for j in range(n):
            s, b = step[row, j], offset[row, j]
            v = (x[row, j] - b) * (1.0 / s if s != 0.0 else 0.0)
            low, high = 0, last
            while low < high:
                middle = (low + high) // 2
                if v <= (values[middle + 1] + values[middle]) / 2.0:
                    high = middle
                else:
                    low = middle + 1
            codes[row, j] = low
            e = (x[row, j] - (b + s * values[low])) * (1.0 / factor[j, j])
            errors[row, j] = e
            for k in range(j + 1, n):
                x[row, k] = x[row, k] - e * factor[j, k]
