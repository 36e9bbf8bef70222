"""Every rule of the format over every byte of a model, with as many violations as there are.

What :func:`uqff.open` refuses at the first sight is collected here layer by layer; on top of it come the rules about
payloads (finite scales, codes in range), about layers as a set (0.x: indices from 0 without a gap, one version), about
``uqff_report.json`` beside a 1.x file, about ``residual.safetensors``, and about ``config.json``: the model that it
announces has to be there.  A container that cannot be opened is one violation.  torch is imported for ``deep`` only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uqff.codec.layer import Layer
from uqff.codes import LOADED_DTYPES, DType, Version
from uqff.container import UqffFile, open_uqff
from uqff.container.document import is_present
from uqff.container.report import REPORT_NAME, check_output, check_report, read_report
from uqff.container.shards import PathLike, at_hand, models_in, select
from uqff.errors import UnsupportedError, UqffError, printable, shortened
from uqff.families.payload import PayloadProblem, not_finite
from uqff.hub.names import is_hub_name
from uqff.inspection.meta import LayerMeta, read_meta
from uqff.inspection.remote import looked_into
from uqff.models.assets import CONFIG_NAME
from uqff.models.config import read_config
from uqff.models.engine import limits_of
from uqff.models.layouts import WeightLayout, layout_beside
from uqff.models.modules import check_complete, config_beside, modules_of
from uqff.progress import Progress, Step, Steps
from uqff.schema.bricks import FieldTrace
from uqff.schema.layout import offset_of_field

__all__ = ["Note", "RuleViolation", "Verification", "notes_of", "verify", "violations_of"]

PRODUCER = "uqff.producer"
"""Key of the metadata, from 1.1 on."""


@dataclass(frozen=True)
class RuleViolation:
    """A broken rule.

    Attributes:
        problem: what is wrong, in one phrase.
        file: path of the file.
        layer: key of the layer, if it is about one.
        field: dotted path of the field, as in the spec's offset tables.
        offset: of the offending byte, from the start of the file.
        expected: what the rule asks for.
        got: what was found.
        rule: id of the rule (:mod:`uqff.rules`), if it has one.
    """

    problem: str
    file: str | None = None
    layer: str | None = None
    field: str | None = None
    offset: int | None = None
    expected: str | None = None
    got: str | None = None
    rule: str | None = None

    @classmethod
    def of(cls, error: UqffError) -> RuleViolation:
        """The same as an error says."""
        expected = None if error.expected is None else str(error.expected)
        got = None if error.got is None else str(error.got)
        return cls(error.problem, error.file, error.layer, error.field, error.offset, expected, got, error.rule)

    def __str__(self) -> str:
        """One line: ``FILE: layer K, field F, offset N: problem: expected E, got G``, fit for a terminal."""
        place = [
            f"layer {shortened(self.layer)}" if self.layer is not None else "",
            f"field {shortened(self.field)}" if self.field is not None else "",
            f"offset {self.offset}" if self.offset is not None else "",
        ]
        what = [
            f"expected {shortened(self.expected)}" if self.expected is not None else "",
            f"got {shortened(self.got)}" if self.got is not None else "",
        ]
        parts = [self.file or "", ", ".join(filter(None, place)), self.problem, ", ".join(filter(None, what))]
        return printable(": ".join(filter(None, parts)))


@dataclass(frozen=True)
class Note:
    """What breaks no rule of the format, and is worth knowing.

    Attributes:
        rule: a name for programs: of a rule of :data:`uqff.models.engine.RULES`, or ``bias-rounded``, or
            ``layout`` or ``structure``.
        text: one line.
        layers: keys of the layers that it is about.
    """

    rule: str
    text: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """What a check found; an iterable of the violations.

    Attributes:
        violations: the broken rules, in the order in which they were found.
        notes: what breaks no rule and is worth knowing.
        layers: how many were looked at.
        nbytes: bytes of these.
    """

    violations: tuple[RuleViolation, ...]
    notes: tuple[Note, ...]
    layers: int
    nbytes: int

    @property
    def clean(self) -> bool:
        """Whether no rule is broken."""
        return not self.violations

    def __iter__(self) -> Iterator[RuleViolation]:
        """The violations."""
        return iter(self.violations)

    def __len__(self) -> int:
        """How many violations there are."""
        return len(self.violations)


def verify(
    path: PathLike | Sequence[PathLike],
    *,
    deep: bool = False,
    strict: bool = False,
    structure: bool = False,
    isq: str | None = None,
    progress: Progress | None = None,
    on_violation: Callable[[RuleViolation], None] | None = None,
) -> Verification:
    """Check a model against every rule of the format; ``uqff verify`` shows what it finds.

    Args:
        path: what :func:`uqff.open` takes; of a directory with several models, each is checked. Of a model on the hub,
            the structure is, which is read by ranges; for ``deep``, the model is fetched.
        deep: dequantise every layer too, and report values that are not finite.
        strict: report what 1.x readers do without, too: a missing report, a producer that is not named, layers that are
            stored plain instead of in the type asked for.
        structure: leave out what needs the weights themselves, which are then not read: that scales and biases are
            finite and codes in range. That this was so is noted.
        isq: of a directory with several models, the type of the one that is meant.
        progress: called once before the first layer and after every layer.
        on_violation: called for each violation when it is found.

    Returns:
        Violations: of the set of layers, then layer by layer in the order of their index, then of the residual; notes.

    Raises:
        OSError: a file cannot be read.

    >>> found = uqff.verify("model", deep=True)
    >>> found.clean, found.layers
    (True, 29)
    """
    if deep and structure:
        raise ValueError("deep and structure exclude each other")
    if not isinstance(path, (str, os.PathLike)) or not is_hub_name(path):
        return _verify(path, isq, deep, strict, structure, progress, on_violation)
    if deep:
        chosen = at_hand(path, isq, several=True)
        return _verify(chosen, None, deep, strict, structure, progress, on_violation)
    with looked_into(path, isq) as looked:
        tell = None if on_violation is None else lambda violation: on_violation(looked.shown(violation))
        return looked.shown(_verify(looked.path, looked.isq, deep, strict, structure or looked.remote, progress, tell))


def _verify(
    path: PathLike | Sequence[PathLike],
    isq: str | None,
    deep: bool,
    strict: bool,
    structure: bool,
    progress: Progress | None,
    on_violation: Callable[[RuleViolation], None] | None,
) -> Verification:
    violations: list[RuleViolation] = []
    notes: list[Note] = []
    layers = nbytes = 0
    last: Step | None = None

    def told(step: Step) -> None:
        nonlocal last
        last = step
        if progress is not None:
            progress(step)

    for model in _models(path, isq):
        last = None
        for violation in violations_of(model, deep=deep, strict=strict, structure=structure, progress=told):
            violations.append(violation)
            if on_violation is not None:
                on_violation(violation)
        notes += notes_of(model)
        if last is not None:
            layers, nbytes = layers + last.done, nbytes + last.work_done
    if structure:
        notes.insert(0, Note("structure", "the structure was checked; the weights were not read", ()))
    return Verification(tuple(violations), (*_layout_notes(path), *notes), layers, nbytes)


def _models(path: PathLike | Sequence[PathLike], isq: str | None) -> list[Any]:
    if not isinstance(path, (str, os.PathLike)):
        return [path]
    chosen = select(path, isq) if isq is not None or not os.path.lexists(path) else Path(path)
    models = models_in(chosen) if chosen.is_dir() else {}
    return list(models.values()) if len(models) > 1 else [chosen]


def _layout_notes(path: PathLike | Sequence[PathLike]) -> list[Note]:
    """What ``config.json`` says of how the weights lie; nothing, if it breaks a rule, which is a violation."""
    first = path if isinstance(path, (str, os.PathLike)) else next(iter(path), None)
    if first is None:
        return []
    try:
        chosen = select(first)
        config = (chosen if chosen.is_dir() else chosen.parent) / CONFIG_NAME
        layout = WeightLayout.of(read_config(config)) if is_present(config) else WeightLayout()
        return [Note("layout", text, ()) for text in layout.notes]
    except (UqffError, FileNotFoundError):
        return []


def violations_of(
    path: PathLike | Sequence[PathLike],
    *,
    deep: bool = False,
    strict: bool = False,
    structure: bool = False,
    progress: Progress | None = None,
) -> Iterator[RuleViolation]:
    """The violations of one model, each when it is found; arguments as for :func:`verify`."""
    try:
        file = open_uqff(path)
    except UqffError as error:
        yield RuleViolation.of(error)
        return
    with file:
        if file.generation == "0.x":
            yield from _check_indices(file)
        else:
            yield from _check_report(file, strict)
        yield from _check_layers(file, deep, structure, progress)
        try:
            _ = file.residual
        except UqffError as error:
            yield RuleViolation.of(error)
        else:
            yield from _check_config(file)


def _check_config(file: UqffFile) -> Iterator[RuleViolation]:
    """A loader counts layers by the configuration, looks for every weight of the model, and takes its order of rows."""
    try:
        config, layout = config_beside(file), layout_beside(file)
    except UqffError as error:
        yield RuleViolation.of(error)
        return
    for key in filter(layout.heads_of, file):
        shape: tuple[int, ...] | None = None
        with contextlib.suppress(UqffError):  # a broken layer, which is reported as such
            record, fields = file.fields(key)
            shape = record.parse(fields).shape
        try:
            layout.order_of(key, 0 if shape is None else shape[0])
        except UqffError as error:
            yield RuleViolation.of(error.within(file=str(file.place(key).path)))
    try:
        if config is not None:
            with contextlib.suppress(UnsupportedError):  # an architecture that is not known here
                check_complete(file, config, modules_of(file, config))
    except UqffError as error:
        yield RuleViolation.of(error)


def _check_report(file: UqffFile, strict: bool) -> Iterator[RuleViolation]:
    """What stands beside a 1.x file is enforced by the engine's loader."""
    directory = file.paths[0].parent
    if strict and PRODUCER not in file.metadata:
        yield RuleViolation(
            "producer is not named", str(file.paths[0]), field=PRODUCER, expected="a text in the metadata"
        )
    try:
        report = read_report(directory)
    except UqffError as error:
        yield RuleViolation.of(error)
        return
    if report is None:
        if strict:
            yield RuleViolation(
                "report is missing", str(directory / REPORT_NAME), expected="a report", got="no such file"
            )
        return
    yield from map(RuleViolation.of, check_report(report, directory))
    names = {path.name for path in file.paths}
    # One output: a shard that several name is a violation already, and each comparison reads every layer.
    for output in [output for output in report.outputs if not names.isdisjoint(output.shards)][:1]:
        for fallback in output.fallbacks if strict else ():
            yield RuleViolation(
                "layer is stored plain",
                str(directory / REPORT_NAME),
                layer=fallback.module,
                expected=fallback.requested,
                got=fallback.stored,
            )
        # A broken layer ends the comparison; it is reported as such.
        with contextlib.suppress(UqffError):
            yield from map(RuleViolation.of, check_output(output, file))


def notes_of(path: PathLike | Sequence[PathLike]) -> list[Note]:
    """What the engine cannot load or run of a model, and biases that lost something when they were stored.

    What a bias was is told by its source only: :func:`uqff.inspection.compare.compare` measures it. A file tells that
    one was rounded where it is in F8E4M3, without any scale, or in fewer bits than the residual's floats.

    Args:
        path: what :func:`uqff.open` takes. Layers that are broken are left out, and of a model that cannot be opened
            there are no notes: :func:`verify` says why.

    Raises:
        OSError: a file cannot be read.
    """
    layers: dict[str, Layer] = {}
    try:
        with open_uqff(path) as file:
            for key in file:
                with contextlib.suppress(UqffError):
                    layers[key] = Layer.of_fields(*file.fields(key))
            load = _residual_dtype(file)
            limits = limits_of(layers, file.version)
            return [*_rounded(layers, load), *(Note(each.rule, str(each), each.layers) for each in limits)]
    except UqffError:
        return []


def _residual_dtype(file: UqffFile) -> DType | None:
    """The dtype in which the model was loaded, as the floats of the residual tell it; None if they do not."""
    try:
        residual = file.mapped[len(file.paths) :]
    except UqffError:
        return None
    dtypes = {entry.dtype for mapped in residual for entry in mapped.header.entries.values()} & LOADED_DTYPES.keys()
    return LOADED_DTYPES[dtypes.pop()] if len(dtypes) == 1 else None


def _rounded(layers: Mapping[str, Layer], load: DType | None) -> Iterator[Note]:
    """Biases whose dtype tells that they were rounded, or may have been."""
    found: dict[tuple[str, DType], list[str]] = {}
    for key, layer in layers.items():
        if layer.bias_part is not None:
            found.setdefault((layer.weight.family.title, layer.bias_part.dtype), []).append(key)
    for (family, dtype), keys in found.items():
        what = f"{len(keys)} biases of {family} layers in {dtype.name}"
        if dtype is DType.F8E4M3:
            text = f"{what} without a scale: rounded to four bits when they were stored, and to 448 at most"
            yield Note("bias-rounded", text, tuple(keys))
        elif load is not None and dtype in LOADED_DTYPES.values() and dtype.itemsize < load.itemsize:
            text = f"{what}, in which the residual's {load.name} numbers do not fit: they may have been rounded"
            yield Note("bias-rounded", text, tuple(keys))


def _check_indices(file: UqffFile) -> Iterator[RuleViolation]:
    """A loader numbers the layers of the model from 0 and finds each of them."""
    previous = -1
    for key in file:
        index = int(key)
        if index != previous + 1:
            place = file.place(key)
            yield RuleViolation(
                "gap in the layer indices",
                file=str(place.path),
                layer=key,
                offset=place.offset,
                expected=f"layer {previous + 1}",
                got=f"layer {index}",
            )
        previous = index


def _check_layers(file: UqffFile, deep: bool, structure: bool, progress: Progress | None) -> Iterator[RuleViolation]:
    sizes = {key: sum(place.nbytes for place in file.places(key).values()) for key in file}
    steps = Steps(progress, "verify", len(sizes), sum(sizes.values()), "bytes")
    first: Version | None = None
    for key, size in sizes.items():
        trace: list[FieldTrace] = []
        try:
            meta = read_meta(file, key, trace=trace)
        except UqffError as error:
            yield RuleViolation.of(error)
        else:
            first = first or meta.version
            yield from _check_version(file, key, meta.version, first)
            if not structure:
                yield from _check_payload(file, key, meta, trace)
            if deep:
                yield from _check_weight(file, key)
        file.release(key)
        steps.add(key, size)


def _check_version(file: UqffFile, key: str, version: Version, first: Version) -> Iterator[RuleViolation]:
    if version != first:
        place = file.place(key)
        yield RuleViolation(
            "layers of several versions",
            file=str(place.path),
            layer=key,
            field="version",
            offset=place.offset,
            expected=f"{first} as in the layers before",
            got=str(version),
        )


def _check_payload(file: UqffFile, key: str, meta: LayerMeta, trace: list[FieldTrace]) -> Iterator[RuleViolation]:
    places = file.places(key)
    for problem in _payload_problems(meta):
        if "" in places:
            place, field, start = places[""], problem.field, offset_of_field(trace, problem.field)
        else:
            field, start = meta.record.ENTRIES.suffix_of(problem.field), 0
            place = places[field]
        yield RuleViolation(
            problem.problem,
            file=str(place.path),
            layer=key,
            field=field,
            offset=None if start is None else place.offset + start + problem.offset,
            expected=problem.expected,
            got=problem.got,
        )


def _payload_problems(meta: LayerMeta) -> Iterator[PayloadProblem]:
    yield from meta.record.check_payload(meta.fields)
    if meta.fields["bias"] is not None:
        yield from not_finite(meta.fields["bias"], "bias.data")


def _check_weight(file: UqffFile, key: str) -> Iterator[RuleViolation]:
    import numpy as np

    place = file.place(key)
    count, first, value = 0, 0, 0.0
    try:
        weight = file[key].weight
        # A stack of experts may be larger than the memory.
        stacked = len(weight.shape) > 2
        for expert in range(weight.shape[0] if stacked else 1):
            numbers = (weight.expert_numbers(expert) if stacked else weight.numbers()).array().view(np.float32)
            bad = ~np.isfinite(numbers)
            found = int(np.count_nonzero(bad))
            if found and not count:
                at = int(np.argmax(bad))
                first, value = expert * numbers.size + at, float(numbers[at])
            count += found
    except UqffError as error:
        yield RuleViolation.of(error)
        return
    if count:
        yield RuleViolation(
            "weight dequantises to numbers that are not finite",
            file=str(place.path),
            layer=key,
            expected=f"{weight.numel} finite numbers",
            got=f"{count} that are not, the first is element {first}: {value}",
        )
