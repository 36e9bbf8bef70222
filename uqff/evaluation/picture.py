"""An evaluation as a picture: how the divergence is distributed, or where there is no reference, how nll is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from uqff.evaluation.evaluate import Evaluation
from uqff.evaluation.svg import Axis, Plot, Series

__all__ = ["write_picture"]

_POINTS = 200


def write_picture(found: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write the picture to an SVG file, which is replaced if it is there.

    Args:
        found: of :func:`uqff.evaluate`.
        path: of the file.
    """
    made = found.predictions
    far = found.distances
    name, values = ("nll", made.nll) if far is None else ("KLD", made.kld)
    shares = np.linspace(0, 100, min(_POINTS, len(values)))
    title = f"{Path(found.model).name}: perplexity {found.perplexity.value:.4g}"
    if far is not None:
        title += f", mean KLD {far.kld.value:.3g}, same top {100 * far.same_top.value:.1f} %"
    plot = Plot(title, Axis("per cent of predictions"), Axis(f"{name}, at most", log=True))
    for each in (None, *found.buckets):
        part = made if each is None else made.within(each.start, each.stop)
        chosen = part.nll if far is None else part.kld
        curve = np.percentile(chosen, shares)
        label = "all" if each is None else f"{each.start} to {each.stop - 1}"
        plot.series.append(Series(label, list(zip(shares.tolist(), curve.tolist(), strict=True))))
    plot.write(Path(path))
