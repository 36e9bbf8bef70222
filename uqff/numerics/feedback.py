"""Error feedback along the inputs of a layer, in numpy.

A layer answers inputs X with X Wᵀ.  What rounding a weight adds to the answer can be made up for, in part, by the
weights whose inputs go along with its own, as far as XᵀX knows: so inputs are rounded one after the other, and what
each lacks is spread over those that are still to come.  With the upper triangle U of ``(XᵀX)⁻¹ = Uᵀ U``, rounding input
j of a row to q leaves ``e = (w[j] - q) / U[j, j]``, of which every later input k takes ``e * U[j, k]``; the squared
error of the answers is the sum of all e².

Everything is float64.  :mod:`uqff.simd.feedback` is :func:`round_inputs` in a kernel, to the last bit; the rest is
linear algebra, whose last bits differ from one machine to another, and so may the codes.

Authority: E. Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers", 2022;
J. Chee et al., "QuIP: 2-bit quantization of large language models with guarantees", 2023 (LDLQ, which is the same).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from uqff.errors import FormatError
from uqff.numerics.fitting import Wide, inverse

__all__ = ["DAMPING", "damped", "input_order", "inverse_factor", "nearest_indices", "round_inputs"]

U8 = npt.NDArray[np.uint8]

DAMPING: Final = 0.05
"""What is added to the diagonal, as part of its mean: it stands for the inputs that the text does not have."""


def damped(hessian: npt.NDArray[np.float32]) -> Wide:
    """XᵀX per mean of its diagonal, and damped; the identity if there were no inputs.

    Args:
        hessian: ``[in, in]``.
    """
    made = hessian.astype(np.float64)
    mean = float(np.mean(np.diagonal(made)))
    if mean == 0:
        return np.eye(len(made))
    made /= mean
    made[np.diag_indices_from(made)] += DAMPING
    return made


def input_order(hessian: Wide, unit: int) -> npt.NDArray[np.int64]:
    """In which order inputs are rounded: those that answers depend on most go first, ``unit`` of them at a time.

    The weights of a block share scales, so that whole blocks take turns, and within a block its inputs.
    """
    diagonal = np.diagonal(hessian).reshape(-1, unit)
    blocks = np.argsort(-diagonal.sum(1), kind="stable")
    within = np.argsort(-diagonal, axis=1, kind="stable")
    order: npt.NDArray[np.int64] = (within + unit * np.arange(len(diagonal))[:, None])[blocks].reshape(-1)
    return order


def inverse_factor(hessian: Wide) -> Wide:
    """The upper triangle U of ``hessian⁻¹ = Uᵀ U``: the inverse of R of ``hessian = R Rᵀ``, which is upper, too.

    Raises:
        FormatError: the matrix is not positive definite.
    """
    try:
        lower = np.linalg.cholesky(hessian[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise FormatError("not XᵀX of any inputs", field="hessian", expected="positive semidefinite") from error
    return np.triu(np.linalg.inv(np.ascontiguousarray(lower[::-1, ::-1])))


def nearest_indices(v: Wide, values: Wide) -> npt.NDArray[np.int64]:
    """Where in ascending ``values`` the nearest of each number is; halfway, the lower."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, v, side="left")


def round_inputs(
    x: Wide, factor: Wide, offset: Wide, step: Wide, values: Wide, codes: U8, near: Wide, errors: Wide, loss: Wide
) -> None:
    """Round the inputs of a block one after the other, each to ``offset + step * value``.

    Args:
        x: ``[n, rows]``, changed: what is fed back is added.
        factor: U of these inputs, ``[n, n]``.
        offset: ``[n, rows]``.
        step: ``[n, rows]``; where it is 0, all values are one.
        values: what codes stand for, ascending.
        codes: uint8 ``[n, rows]``, to be written: indices into ``values``.
        near: ``[n, rows]``, to be written: the numbers that these stand for.
        errors: ``[n, rows]``, to be written: e of every weight.
        loss: ``[rows]``, to be written: the sum of e², input after input.
    """
    loss[:] = 0
    for j in range(len(x)):
        codes[j] = nearest_indices((x[j] - offset[j]) * inverse(step[j]), values)
        near[j] = offset[j] + step[j] * values[codes[j]]
        errors[j] = (x[j] - near[j]) * (1 / factor[j, j])
        loss += errors[j] * errors[j]
        x[j + 1 :] -= errors[j] * factor[j, j + 1 :, None]
