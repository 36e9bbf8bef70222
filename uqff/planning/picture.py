"""Size against quality: the mixes of least cost beside all uniform types."""

from __future__ import annotations

import os
from pathlib import Path

from uqff.evaluation.svg import Axis, Plot, Series
from uqff.planning.plan import ModelPlan

__all__ = ["write_frontier"]


def write_frontier(plan: ModelPlan, path: str | os.PathLike[str]) -> None:
    """Write the picture to an SVG file, which is replaced if it is there.

    Args:
        plan: with a mix.
        path: of the file.
    """
    what = "mean KLD, predicted" if plan.measure == "kld" else "sum of relative squared errors"
    plot = Plot(f"{Path(plan.source).name}: mixes and uniform types", Axis("bits per weight"), Axis(what, log=True))
    plot.series.append(Series("mixes", [(each.bits_per_weight, each.cost) for each in plan.frontier]))
    uniform = [(each.bits_per_weight, each.cost) for each in plan.uniform]
    plot.series.append(Series("uniform types", uniform, [each.name for each in plan.uniform], line=False))
    if plan.mix is not None:
        plot.series.append(Series("this mix", [(plan.mix.bits_per_weight, plan.mix.cost)], line=False))
    if plan.mix is not None and plan.check is not None and plan.check.distances is not None:
        point = plan.mix.bits_per_weight, plan.check.distances.kld.value
        plot.series.append(Series("this mix, measured", [point], line=False))
    plot.write(Path(path))
