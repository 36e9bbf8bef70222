"""What a single layer's type costs: the divergence of a model of which nothing else is quantised."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from uqff.errors import UnsupportedError
from uqff.evaluation.evaluate import window_logits
from uqff.evaluation.measures import Estimate, Predictions, Reference
from uqff.evaluation.windows import TextWindows
from uqff.importance.matrix import Importance
from uqff.importance.names import entry_names
from uqff.parallel.gather import ExpertList
from uqff.parallel.layer import QuantizedLayer
from uqff.parallel.plan import EMBEDDING, HEAD
from uqff.planning.candidates import Unit, relative
from uqff.progress import Progress, Steps
from uqff.quantization.types import EffortName, Engine, quantize

__all__ = ["Swapper"]

PROBED: Final = 0.12
"""Root of the relative squared error at which a layer is probed, or as near as candidates come: well above rounding,
and small enough that the divergence still goes by the squared error."""


class Swapper:
    """A plain model, in which one unit at a time is quantised."""

    def __init__(
        self,
        model: Any,
        windows: TextWindows,
        importance: Importance | None = None,
        *,
        effort: EffortName = "engine",
        engine: Engine,
        dtype: torch.dtype,
    ) -> None:
        """Run the model as it is.

        Args:
            model: of :func:`uqff.load_model`, plain.
            windows: of the text.
            importance: of inputs, by which codes and scales are chosen, too; None if they are not.
            effort: how codes and scales are chosen.
            engine: whose quantiser.
            dtype: the load dtype.
        """
        self._model, self._windows = model, windows
        self._options: Any = {"engine": engine, "dtype": dtype, "effort": effort}
        self._importance = importance
        self._targets = [torch.tensor(windows.targets(at)) for at in range(len(windows))]
        self._plain = [window_logits(model, ids, windows.first) for ids in windows]
        self._paths: dict[str, list[str]] = {}
        for path, layer in model.named_modules():
            if isinstance(layer, ExpertList | QuantizedLayer) or getattr(layer, "weight", None) is not None:
                for name in entry_names(path):
                    self._paths.setdefault(name, []).append(path)

    def divergence(self) -> Estimate:
        """Mean divergence of the model as it is now from what it was at first."""
        found = []
        for ids, targets, plain in zip(self._windows, self._targets, self._plain, strict=True):

            def reference(part: slice, plain: Any = plain, targets: Any = targets) -> Reference:
                return Reference.of(plain[part], targets[part])

            logits = window_logits(self._model, ids, self._windows.first)
            found.append(Predictions.of(logits, targets, self._windows.first, reference))
        distances = Predictions.joined(found).distances
        assert distances is not None
        return distances.kld

    def divergence_of(self, units: Sequence[Unit], kinds: Sequence[str]) -> Estimate:
        """The same of the model with all units quantised."""
        with contextlib.ExitStack() as stack:
            for unit, kind in zip(units, kinds, strict=True):
                stack.enter_context(self.swapped(unit, kind))
            return self.divergence()

    @contextlib.contextmanager
    def swapped(self, unit: Unit, kind: str) -> Iterator[None]:
        """The model with the layers of a unit quantised."""
        places = [place for goal in unit.goals for place in self._places(goal.module)]
        names = [goal.module for goal in unit.goals for _ in self._places(goal.module)]
        before = [getattr(*place) for place in places]
        made: dict[int, Any] = {}
        try:
            for name, place, layer in zip(names, places, before, strict=True):
                if id(layer) not in made:
                    made[id(layer)] = self._changed(name, layer, kind)
                setattr(*place, made[id(layer)])
            yield
        finally:
            for place, layer in zip(places, before, strict=True):
                setattr(*place, layer)

    def _places(self, module: str) -> list[tuple[Any, str]]:
        """Where a layer stands in the model: of a tied one, twice."""
        embedding, head = self._model.get_submodule(EMBEDDING), self._model.get_submodule(HEAD)
        if module in (EMBEDDING, HEAD):
            own = (embedding if module == EMBEDDING else head).rows
            return [(each, "rows") for each in (embedding, head) if each.rows is own]
        return [self._place(path) for path in self._paths_of(module)]

    def _paths_of(self, module: str) -> list[str]:
        """Where a layer of the file stands in the model; of two matrices in one, that of each."""
        with contextlib.suppress(AttributeError):
            self._model.get_submodule(module)
            return [module]
        found = dict.fromkeys(path for name in entry_names(module) for path in self._paths.get(name, ()))
        if not found:
            raise UnsupportedError("the model has no such layer to be measured", layer=module)
        return list(found)

    def _place(self, path: str) -> tuple[Any, str]:
        parent, _, name = path.rpartition(".")
        held = self._model.get_submodule(parent)
        layer = getattr(held, name)
        return (held, name) if isinstance(layer, ExpertList | QuantizedLayer) else (layer, "weight")

    def _changed(self, module: str, layer: Any, kind: str) -> Any:
        if isinstance(layer, ExpertList):
            stack, _, projection = module.rpartition(".")
            experts = range(len(layer))
            made = [self._changed(f"{stack}.{at}.{projection}", layer[at], kind) for at in experts]
            return ExpertList(made, layer.key)
        weight = layer.detach() if isinstance(layer, torch.nn.Parameter) else layer.dequantize_w()
        tied = module == EMBEDDING and len(self._places(module)) > 1
        found = None if self._importance is None else self._importance.of(module, weight.shape, tied=tied)
        if isinstance(layer, torch.nn.Parameter):  # of a router, which transformers holds as it is
            record = quantize(weight, kind, importance=found, module=module, **self._options)
            return torch.nn.Parameter(record.dequantize(weight.dtype), requires_grad=False)
        held: QuantizedLayer = layer
        record = quantize(weight, kind, importance=found, module=held.key, **self._options)
        return held._changed(record, held.bias)

    def measure(self, units: Sequence[Unit], progress: Progress | None = None) -> None:
        """Find the cost of every candidate: measured of one, of the others by their errors in proportion.

        Args:
            units: with errors; get costs.
            progress: is told of each.
        """
        steps = Steps(progress, "plan", len(units), len(units) * len(self._windows) * self._windows.context, "tokens")
        for unit in units:
            probe = min(unit.candidates.values(), key=lambda each: _off(relative(unit, each)))
            scale = 0.0
            if probe.error:
                with self.swapped(unit, probe.kind):
                    scale = max(0.0, self.divergence().value) / probe.error
            for candidate in unit.candidates.values():
                candidate.cost = scale * candidate.error
            steps.add(unit.name, len(self._windows) * self._windows.context)


def _off(share: float) -> float:
    """How far a relative squared error is from the one that is probed at."""
    return math.inf if share <= 0 or math.isinf(share) else abs(math.log(share / PROBED**2))
