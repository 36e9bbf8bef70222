"""Immediate ISQ: layers are quantised while they are loaded, on a pool of threads, each rank its slices.

::

    load_model("DIR", isq="q4k", workers=4)

    the calling thread       decides on types and slices by headers alone, and hands out layers
    at most workers + 1      layers are outstanding: it waits before it hands out one more
    workers                  read, quantise, give back the pages that they have read
    QuantizeOntoGuard        lets one of them at a time put a layer onto a GPU

Which layer gets which type is for rules, a default and predicates, in the engine's order: of rules (a recipe, see
:mod:`uqff.quantization.recipe`) the first that selects the layer and names a type; else the default type, if a
predicate is found in the name of the weight.  Heads and embeddings are promoted, where they get the default.

Nothing depends on the number of workers: a layer is made of its source alone.  If one cannot be made, or the caller is
interrupted, those that were not begun are dropped.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/lib.rs`` (``should_apply_immediate_isq``,
``resolve_immediate_isq``, ``IsqBackpressure``, ``QuantizeOntoGuard``), ``utils/isq.rs`` (``apply_immediate_isq``),
``pending_layer.rs`` (``PendingIsqLayer``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from uqff.container.closing import Closing
from uqff.errors import UnsupportedError, UqffError, located
from uqff.models.architectures import LayerName, block_of
from uqff.models.patterns import Pattern
from uqff.parallel.unloaded import Unloaded, quantised
from uqff.quantization.recipe import Recipe, load_recipe
from uqff.quantization.types import Engine, Fallback, kind_name, promoted
from uqff.simd.threads import num_threads

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ImmediateIsq", "IsqPool", "PendingLayer", "QuantizeOntoGuard", "Types"]

_Value = TypeVar("_Value")

Types: TypeAlias = "str | int | Recipe | os.PathLike[str]"
"""A type, a number of bits, a recipe, or the file of one."""


class QuantizeOntoGuard:
    """Lets one thread at a time put layers onto a device that is not the CPU.

    Example:
        >>> guard = uqff.parallel.QuantizeOntoGuard()
        >>> with guard.on("cpu"), guard.on("cpu"):  # nobody waits
        ...     pass
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """While a layer is quantised onto a device."""
        if torch.device(device).type == "cpu":
            yield
            return
        with self._lock:
            yield


class ImmediateIsq:
    """Which layers become which types while they are loaded.

    Attributes:
        kind: the default type; None if only rules quantise.
        recipe: the rules; None if there are none.
        predicates: what is searched in ``<path>.weight`` of layers that no rule names a type for.
        pool: threads that quantise single layers; None if the caller does.
        fallbacks: the layers that became another type than asked for.

    Example:
        >>> isq = uqff.parallel.ImmediateIsq("q4k", predicates=["[.]mlp[.]"])
        >>> isq.kind_of("model.layers.0.mlp.up_proj"), isq.kind_of("lm_head")
        ('q4k', None)
    """

    def __init__(
        self,
        isq: Types,
        *,
        recipe: Recipe | None = None,
        predicates: Iterable[str] | None = None,
        engine: Engine = "0.9",
        pool: IsqPool | None = None,
    ) -> None:
        """Rules, default and predicates.

        Args:
            isq: the default type: an ISQ name or a number of bits; or a :class:`~uqff.quantization.recipe.Recipe`, or
                the file of one, which then is all there is.
            recipe: rules beside a default type.
            predicates: patterns, of which one must be found in ``<path>.weight``; all layers, if None.
            engine: whose quantiser and rules.
            pool: threads that quantise, for constructors of single layers, which then give a :class:`PendingLayer`.

        Raises:
            UnsupportedError: no such type, or recipes in both places.
            FormatError: a recipe or pattern breaks a rule.
            OSError: the file of a recipe cannot be read.
        """
        self.kind: str | None = None
        self.recipe = recipe
        if isinstance(isq, (Recipe, os.PathLike)) or (isinstance(isq, str) and _is_file(isq)):
            if recipe is not None:
                raise UnsupportedError("two recipes", field="isq", expected="a type beside a recipe", got=isq)
            self.recipe = isq if isinstance(isq, Recipe) else load_recipe(isq)
        else:
            self.kind = kind_name(isq)
        self.predicates = None if predicates is None else [Pattern(each) for each in predicates]
        self.engine: Engine = engine
        self.pool = pool
        self.fallbacks: list[Fallback] = []

    def kind_of(self, path: str, *, sensitive: bool = False) -> str | None:
        """The type that a layer gets; None if it stays as it is.

        Args:
            path: of its weight in the checkpoint; of an expert, of the first of its projection.
            sensitive: whether it is a head or an embedding, which the default promotes.
        """
        weight = f"{path}.weight"
        explicit = None
        if self.recipe is not None:
            explicit = self.recipe.explicit_kind(LayerName(0, path, weight, block_of(path)), engine=self.engine)
        if explicit is not None or self.kind is None:
            return explicit
        if self.predicates is not None and not any(each.search(weight) for each in self.predicates):
            return None
        return promoted(self.kind) if sensitive else self.kind

    def device_of(self, path: str) -> torch.device | None:
        """The device that the first rule names that selects a layer; None if it is the model's."""
        name = LayerName(0, path, f"{path}.weight", block_of(path))
        rules = () if self.recipe is None else self.recipe.rules
        given = next((rule.device for rule in rules if rule.selects(name)), None)
        return None if given is None else torch.device(given.replace("[", ":").rstrip("]").replace("metal", "mps"))

    def applied(self, source: Unloaded, *, sensitive: bool = False) -> Unloaded:
        """A layer, quantised while it is loaded if it is to be.

        Args:
            source: the layer.
            sensitive: see :meth:`kind_of`.

        Raises:
            UqffError: the engine fails on that shape.
        """
        kind = self.kind_of(source.path, sensitive=sensitive)
        if kind is None:
            return source
        return quantised(source, kind, engine=self.engine, on_fallback=self.fallbacks.append)

    def __repr__(self) -> str:
        rules = () if self.recipe is None else self.recipe.rules
        shown = [(rule.selector, rule.kind, rule.device) for rule in rules]
        predicates = None if self.predicates is None else [each.text for each in self.predicates]
        return f"ImmediateIsq({self.kind!r}, rules={shown}, predicates={predicates}, engine={self.engine!r})"


def _is_file(text: str) -> bool:
    """Whether a text is a file, not a type."""
    try:
        kind_name(text)
    except UnsupportedError:
        return Path(text).is_file()
    return False


class IsqPool(Closing):
    """Threads that load and quantise layers: a :data:`~uqff.parallel.loading.Run` with back-pressure.

    Attributes:
        workers: how many.

    Example:
        >>> with uqff.parallel.IsqPool(workers=2) as pool:
        ...     results = [pool(str(i), lambda i=i: i * i) for i in range(4)]
        ...     [each() for each in results]
        [0, 1, 4, 9]
    """

    def __init__(self, workers: int | None = None) -> None:
        """Start no thread yet.

        Args:
            workers: at least 1; as many as a kernel may use threads if None.

        Raises:
            UnsupportedError: less than 1.
        """
        workers = num_threads() if workers is None else workers
        if type(workers) is not int or workers < 1:
            raise UnsupportedError("not a number of workers", field="workers", expected="at least 1", got=workers)
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="uqff-isq")
        self._free = threading.Semaphore(workers + 1)
        self._futures: set[Future[Any]] = set()
        self._failed: Future[Any] | None = None

    def _done(self, future: Future[Any]) -> None:
        self._futures.discard(future)
        if not future.cancelled() and future.exception() is not None:
            self._failed = self._failed or future
        self._free.release()

    def __call__(self, key: str, work: Callable[[], _Value]) -> Callable[[], _Value]:
        """Hand out work; waits while ``workers + 1`` are outstanding.

        Args:
            key: of the layer, which errors name.
            work: what is done.

        Returns:
            What waits for the result.

        Raises:
            UqffError: earlier work has failed; what was not begun is dropped.
        """
        self._free.acquire()
        if self._failed is not None:
            self._free.release()
            self.cancel()
            self._failed.result()
        future = self._threads.submit(_named, key, work)
        self._futures.add(future)
        future.add_done_callback(self._done)

        def result() -> _Value:
            try:
                made: _Value = future.result()
            except CancelledError:
                raise UqffError("layer was not loaded: loading was given up", layer=key) from None
            except BaseException:
                self.cancel()
                raise
            return made

        return result

    def cancel(self) -> None:
        """Drop what was not begun."""
        for future in list(self._futures):
            future.cancel()

    def close(self) -> None:
        """Drop what was not begun, and wait for the rest."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _named(key: str, work: Callable[[], _Value]) -> _Value:
    """Work whose errors name the layer."""
    with located(layer=key):
        try:
            return work()
        except UqffError:
            raise
        except Exception as error:
            raise UqffError("layer could not be loaded", got=f"{type(error).__name__}: {error}") from error


class PendingLayer(torch.nn.Module):
    """A layer that a thread is making; waits for it when it is first used, and is that layer from then on.

    Attributes:
        key: of the layer.

    Example:
        >>> import torch
        >>> with uqff.parallel.IsqPool(1) as pool:
        ...     make = lambda: uqff.parallel.ReplicatedLayer(torch.eye(2))
        ...     layer = uqff.parallel.PendingLayer("lm_head", pool("lm_head", make))
        ...     layer(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, key: str, loaded: Callable[[], torch.nn.Module]) -> None:
        """A layer that ``loaded`` waits for."""
        super().__init__()
        self.key = key
        self._loaded: Callable[[], torch.nn.Module] | None = loaded

    def resolve(self) -> torch.nn.Module:
        """The layer.

        Raises:
            UqffError: what the thread raised, naming the layer; each time.
        """
        if self._loaded is not None:
            self.add_module("layer", self._loaded())
            self._loaded = None
        return self.get_submodule("layer")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's does."""
        return self.resolve()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "layer":
                raise
        return getattr(self.resolve(), name)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.resolve()
        made: Self = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return made

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the layer, under ``layer``."""
        self.resolve()
        return super().state_dict(*args, **kwargs)
