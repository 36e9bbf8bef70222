"""The least error that blocks of a type can have, whatever finds their scales: what a search is measured against.

    python -m tools.quality.optimum

Exact but for rounding: scales and offsets are any numbers here, those of a file are of 16 or 32 bits, so that no file
comes below. On weights of a normal distribution.

q4_0: codes of a block change only where the inverse scale takes a weight half way between two of them. Between two such
points all codes are one set, whose best scale is that of least squares: all sets are tried.

afq2: with any scale and offset, each code has a run of the sorted weights of its group. All ways to cut 64 weights into
four runs are tried, each with the scale and offset of least squares; some codes may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import click
import numpy as np
import numpy.typing as npt

import uqff
from uqff.quantization.error import distance

__all__ = ["LEAST", "least_afq2", "least_q4_0"]

Wide = npt.NDArray[np.float64]


def least_q4_0(w: npt.ArrayLike) -> float:
    """The sum of squared errors of weights in blocks of 32."""
    least = 0.0
    for x in np.asarray(w, np.float64).reshape(-1, 32):
        explained = [0.0]
        for signed in (x, -x):
            some = signed[signed != 0]
            high = np.where(some > 0, 7, 8)
            points = (np.arange(8) + 0.5) / np.abs(some)[:, None]
            points = np.unique(points[np.arange(8) < high[:, None]])
            if len(points):
                inverses = np.append((points[1:] + points[:-1]) / 2, points[-1] * 2)
                q = np.clip(np.rint(signed * inverses[:, None]), -8, 7)
                explained.extend((q @ signed) ** 2 / np.maximum((q * q).sum(1), 1))
        least += float((x * x).sum() - max(explained))
    return least


def least_afq2(w: npt.ArrayLike) -> float:
    """The sum of squared errors of weights in groups of 64."""
    above = np.stack(np.meshgrid(*[np.arange(65)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sizes = 64 - above[(above[:, 0] <= above[:, 1]) & (above[:, 1] <= above[:, 2])]
    codes, squares = sizes.sum(1), sizes @ np.array([1, 3, 5])
    variance = squares - codes * codes / 64
    several = variance > 0
    sizes, codes, variance = sizes[several], codes[several], variance[several]
    least = 0.0
    for x in np.sort(np.asarray(w, np.float64).reshape(-1, 64), 1):
        beyond = np.append(0.0, np.cumsum(x[::-1]))
        products = beyond[sizes].sum(1) - x.sum() * codes / 64
        least += float((x * x).sum() - x.sum() ** 2 / 64 - (products**2 / variance).max())
    return least


LEAST: Final[Mapping[str, Callable[[npt.ArrayLike], float]]] = {"q4_0": least_q4_0, "afq2": least_afq2}
"""By type."""


@click.command()
@click.option("--weights", default=1 << 18, show_default=True, help="How many, in rows of 512.")
@click.option("--seed", default=7, show_default=True)
def main(weights: int, seed: int) -> None:
    """Print relative RMS errors: the least, and what the engine and `best` make."""
    w = np.random.default_rng(seed).standard_normal((weights // 512, 512)).astype(np.float32)
    whole = float(np.square(w, dtype=np.float64).sum())
    for kind, least in LEAST.items():
        engine, best = (distance(w, uqff.quantize(w, kind, effort=each)).relative for each in ("engine", "best"))
        click.echo(f"{kind}: least {(least(w) / whole) ** 0.5:.5f}, best {best:.5f}, engine {engine:.5f}")


if __name__ == "__main__":
    main()
