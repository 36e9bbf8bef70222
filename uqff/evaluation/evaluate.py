"""A model's predictions of a text, and how far they are from those of a reference: on one rank or several.

evaluation = uqff.evaluate("MODEL", text="text.txt", reference="CHECKPOINT")
evaluation.perplexity, evaluation.distances.kld
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uqff.container.atomic import atomic_files
from uqff.container.document import read_text
from uqff.errors import FormatError, UnsupportedError
from uqff.evaluation.kept import KeptLogits, LogitsWriter
from uqff.evaluation.measures import Distances, Estimate, Predictions, Reference
from uqff.evaluation.windows import TextWindows
from uqff.limits import MAX_TEXT_BYTES
from uqff.parallel.comm import Comm, exchange_device
from uqff.parallel.consensus import settle
from uqff.parallel.model import Check, load_model
from uqff.parallel.source import directory_of, open_source
from uqff.parallel.text import Text
from uqff.progress import Progress, Steps

if TYPE_CHECKING:
    from uqff.parallel.immediate import ImmediateIsq, Types

__all__ = ["Bucket", "Evaluation", "evaluate", "text_windows", "window_logits"]

SCHEMA = 1
"""Of the document; raised when a member is renamed, removed or changes its meaning."""


@dataclass(frozen=True)
class Bucket:
    """What was measured at some positions of the windows.

    Attributes:
        start: first position.
        stop: behind the last.
        count: how many predictions.
        perplexity: of the model.
        distances: from the reference; None without one.
    """

    start: int
    stop: int
    count: int
    perplexity: Estimate
    distances: Distances | None


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        model: the path.
        reference: whose predictions are taken as true, as a text; None if nobody's.
        windows: of the text.
        predictions: what was measured of each.
        buckets: the same by position in the window.
    """

    model: str
    reference: str | None
    windows: TextWindows
    predictions: Predictions
    buckets: list[Bucket]

    @property
    def perplexity(self) -> Estimate:
        """Of the model."""
        return self.predictions.perplexity

    @property
    def distances(self) -> Distances | None:
        """From the reference; None if there is none."""
        return self.predictions.distances

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        windows = self.windows
        return {
            "schema": SCHEMA,
            "model": self.model,
            "reference": self.reference,
            "text": {"tokens": len(windows.ids), "digest": windows.digest()},
            "windows": {
                "count": len(windows),
                "context": windows.context,
                "stride": windows.stride,
                "first": windows.first,
            },
            "predictions": len(self.predictions),
            "perplexity": self.perplexity.document,
            "distances": _document(self.distances),
            "buckets": [
                {
                    "start": each.start,
                    "stop": each.stop,
                    "predictions": each.count,
                    "perplexity": each.perplexity.document,
                    "distances": _document(each.distances),
                }
                for each in self.buckets
            ],
        }


def _document(distances: Distances | None) -> dict[str, Any] | None:
    if distances is None:
        return None
    made: dict[str, Any] = {}
    for each in fields(distances):
        value = getattr(distances, each.name)
        if isinstance(value, dict):
            made[each.name] = {f"{key:g}": estimate.document for key, estimate in value.items()}
        else:
            estimate = value if isinstance(value, Estimate) else Estimate(value, None)
            made[each.name] = estimate.document if value is estimate else estimate.document["value"]
    return made


def evaluate(
    path: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    logits: str | os.PathLike[str] | None = None,
    keep_logits: str | os.PathLike[str] | None = None,
    context: int = 512,
    stride: int | None = None,
    first: int | None = None,
    windows: int | None = None,
    buckets: int = 4,
    comm: Comm | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    check: Check = "sample",
    isq: Types | ImmediateIsq | None = None,
    reference_isq: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well a model predicts a text, and how far it is from a reference.

    What is measured, and with what error, is told in :mod:`uqff.evaluation.measures`; the columns of
    ``llama-perplexity --kl-divergence`` are among it.

    Args:
        path: a UQFF directory or file, or a checkpoint, as :func:`uqff.load_model` takes it.
        text: a file of UTF-8 text.
        reference: the model that is taken as true: usually the checkpoint. Both are in memory at the same time.
        logits: a file of its predictions, made by ``keep_logits``, instead of running it; if ``reference`` is given
            too, the file must be of that model.
        keep_logits: where to keep the predictions of the reference, or of the model itself if there is none.
        context: tokens of a window.
        stride: tokens from one window to the next; ``context`` if None.
        first: position in the window from which on predictions count; half the context if None, or more where windows
            overlap so far that some would count twice.
        windows: how many at most.
        buckets: into how many ranges of positions the findings are divided besides.
        comm: the ranks, each of which calls this; a world of one if None.
        device: where the models go.
        dtype: of activations, of both models; float32, so that nothing but the weights is measured.
        check: how the ranks' files are compared.
        isq: of UQFF, which model of several; of a checkpoint, what it is quantised to while it is loaded.
        reference_isq: which model of several the reference is.
        workers: threads that quantise.
        progress: is told of each window.

    Raises:
        FormatError: the text is too short or is no text, or the file of logits is of another model or text.
        UqffError: see :func:`uqff.load_model`.
        OSError: a file cannot be read or written.

    >>> found = uqff.evaluate("checkpoint", text="text.txt", reference="checkpoint", context=16)
    >>> found.distances.kld
    Estimate(value=0.0, error=0.0)
    """
    comm, device = Comm.of(comm), torch.device(device)
    exchange = exchange_device(device)
    if buckets < 1:
        raise UnsupportedError("no such number", field="buckets", expected="1 or more", got=buckets)
    if logits is not None and keep_logits is not None:
        raise UnsupportedError("logits are kept already", field="keep_logits", expected="without logits")

    def read() -> TextWindows:
        return text_windows(path, isq, text, context=context, stride=stride, first=first, most=windows)

    cut = settle(comm, "reading the text", read, exchange)
    comm.check_same(bytes.fromhex(cut.digest()), "text", exchange)
    options: Any = {"device": device, "dtype": dtype, "check": check}
    kept: KeptLogits | None = None
    with contextlib.ExitStack() as stack:
        if logits is not None:
            kept = settle(comm, "opening logits", lambda: _kept(Path(logits), cut, reference, reference_isq), exchange)
            stack.callback(kept.close)
        model = load_model(path, comm, isq=isq, workers=workers, **options)
        other = None
        if reference is not None and kept is None:
            other = load_model(reference, comm, isq=reference_isq, **options)
        vocabulary = _vocabulary(model, other, kept, path)
        keep: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        if keep_logits is not None:
            of, its = (path, isq) if reference is None else (reference, reference_isq)

            def begin() -> LogitsWriter | None:
                if comm.rank:
                    return None
                stage = stack.enter_context(atomic_files())
                return LogitsWriter(stage(Path(keep_logits)), cut, vocabulary, os.fspath(of), model_digest(of, its))

            writer = settle(comm, "keeping logits", begin, exchange)
            keep = _keeping(writer, comm, exchange)
            if writer is not None:
                stack.callback(writer.close)
        steps = Steps(progress, "evaluate", len(cut), len(cut) * cut.context, "tokens")
        found: list[Predictions] = []
        for at, ids in enumerate(cut):
            own = window_logits(model, ids, cut.first)
            true = None if other is None else window_logits(other, ids, cut.first)
            targets = torch.tensor(cut.targets(at), device=own.device)
            found.append(Predictions.of(own, targets, cut.first, _reference(at, true, targets, kept)))
            if keep is not None:
                keep(own if true is None else true, targets)
            steps.add(f"window {at + 1}", cut.context)
        if keep_logits is not None and writer is not None:
            writer.finish()
    joined = Predictions.joined(found)
    name = os.fspath(reference) if reference is not None else kept.model if kept is not None else None
    return Evaluation(os.fspath(path), name, cut, joined, _buckets(joined, cut, buckets))


@torch.inference_mode()
def window_logits(model: torch.nn.Module, ids: tuple[int, ...], first: int) -> torch.Tensor:
    """The logits of a window's predictions that count, ``[context - 1 - first, vocabulary]``.

    Args:
        model: of :func:`uqff.load_model`.
        ids: the tokens of the window.
        first: position of the first.
    """
    given = torch.tensor([ids], device=next(model.parameters()).device)
    kept: torch.Tensor = model(input_ids=given, use_cache=False, logits_to_keep=len(ids) - first).logits[0, :-1]
    return kept


def model_digest(path: str | os.PathLike[str], isq: Types | ImmediateIsq | None = None) -> str:
    """What identifies a model: headers, configuration, a sample of each tensor, and what it is quantised to."""
    source, quantising = open_source(path, isq)
    with source:
        return source.digest(quantising).hex()


def text_windows(
    path: str | os.PathLike[str], isq: object, text: str | os.PathLike[str], **options: Any
) -> TextWindows:
    """A text in windows, as a model's own tokenizer reads it.

    Args:
        path: of the model.
        isq: which one of several.
        text: the file.
        options: of :meth:`TextWindows.of`.
    """
    with directory_of(path, isq) as directory:
        tokenizer = Text(directory)
    ids = tokenizer.encode(read_text(Path(text), MAX_TEXT_BYTES), raw=True)
    return TextWindows.of(ids, tokenizer.begin, **options)


def _kept(path: Path, windows: TextWindows, reference: str | os.PathLike[str] | None, isq: str | None) -> KeptLogits:
    digest = None if reference is None else model_digest(reference, isq)
    kept = KeptLogits(path, windows)
    if digest not in (None, kept.digest):
        kept.close()
        raise FormatError(
            "logits of another model",
            file=str(path),
            field="__metadata__.model.digest",
            expected=digest,
            got=f"{kept.digest}, of {kept.model}",
        )
    return kept


def _keeping(
    writer: LogitsWriter | None, comm: Comm, exchange: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """What rank 0 writes of each window; the others wait, so that a full disk is an error of all."""

    def keep(logits: torch.Tensor, targets: torch.Tensor) -> None:
        settle(comm, "keeping logits", lambda: None if writer is None else writer.add(logits, targets), exchange)

    return keep


def _vocabulary(
    model: torch.nn.Module, other: torch.nn.Module | None, kept: KeptLogits | None, path: str | os.PathLike[str]
) -> int:
    size: int = _config(model).vocab_size
    expected = kept.vocabulary if kept is not None else _config(other).vocab_size if other is not None else size
    if size != expected:
        raise FormatError("model and reference have other tokens", file=os.fspath(path), expected=expected, got=size)
    return size


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _reference(
    window: int, logits: torch.Tensor | None, targets: torch.Tensor, kept: KeptLogits | None
) -> Callable[[slice], Reference] | None:
    if logits is not None:
        return lambda part: Reference.of(logits[part], targets[part])
    if kept is not None:
        return lambda part: kept.window(window, part, targets.device)
    return None


def _buckets(found: Predictions, windows: TextWindows, count: int) -> list[Bucket]:
    return list(_made_buckets(found, windows, min(count, windows.scored)))


def _made_buckets(found: Predictions, windows: TextWindows, count: int) -> Iterator[Bucket]:
    edges = [windows.first + windows.scored * at // count for at in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        part = found.within(start, stop)
        if len(part):
            yield Bucket(start, stop, len(part), part.perplexity, part.distances)
