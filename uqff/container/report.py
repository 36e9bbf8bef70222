"""``uqff_report.json``, which stands beside 1.x files and says what became of each layer.

::

    {schema: 1, generated_by: {tool, ...}, base_model?, repo_id?, uqff_version,
     outputs: [{quant, shards: [name], layers: n, actual_counts: {type: n}, fallback_count: n,
                fallbacks?: [{module, from, to, shape, reason?}],
                layer_details?: [{module, default_target?, resolved_target?, stored, shape}]}]}

Where there is one, the engine enforces it: a report without outputs, or a shard it names that is not there, and the
model does not load.  ``shape`` is that of the entry ``weight.shape`` or, where a family has none, of ``weight`` itself,
packed as it is.

Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/uqff/report.rs`` (``UqffReport``, ``validate_output_integrity``,
``is_fallback_storage``) and ``mistralrs-core/src/pipeline/isq.rs`` (``validate_uqff_report_identity``).
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uqff._version import __version__
from uqff.bounded_json import check_values, check_width
from uqff.codes import Version
from uqff.container.atomic import atomic_file
from uqff.container.document import json_bytes, read_at_most
from uqff.container.file import UqffFile
from uqff.container.shards import SUFFIX, PathLike, stays_inside
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError, located
from uqff.limits import MAX_RANK, MAX_REPORT_BYTES, U32_MAX

__all__ = [
    "REPORT_NAME",
    "LayerEntry",
    "Report",
    "ReportedFallback",
    "ReportedOutput",
    "build_output",
    "build_report",
    "check_output",
    "check_report",
    "read_report",
    "report_document",
    "write_report",
]

REPORT_NAME = "uqff_report.json"
SCHEMA = 1


@dataclass(frozen=True)
class LayerEntry:
    """One layer: path of the weight, types asked for (by default, and after promotion or topology), type and shape."""

    module: str
    stored: str
    shape: tuple[int, ...]
    default_target: str | None = None
    resolved_target: str | None = None


@dataclass(frozen=True)
class ReportedFallback:
    """A layer that is stored plain instead of in the type asked for."""

    module: str
    requested: str
    stored: str
    shape: tuple[int, ...]
    reason: str | None = None


@dataclass(frozen=True)
class ReportedOutput:
    """One quantisation of the model: its type, files, and layers."""

    quant: str
    shards: tuple[str, ...]
    layers: int
    actual_counts: Mapping[str, int]
    fallback_count: int
    fallbacks: tuple[ReportedFallback, ...] = ()
    layer_details: tuple[LayerEntry, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a report says. ``generated_by`` has texts under ``tool`` and whatever else the tool says of itself."""

    uqff_version: str
    outputs: tuple[ReportedOutput, ...]
    generated_by: Mapping[str, str] = field(default_factory=lambda: {"tool": "uqff"})
    base_model: str | None = None
    repo_id: str | None = None
    schema: int = SCHEMA


def read_report(path: PathLike) -> Report | None:
    """Read the report of a model directory.

    Args:
        path: the directory, or the report itself.

    Returns:
        The report, not yet compared with the files; None if the directory has none.

    Raises:
        FormatError: it is too long, not JSON, or not a report; ``field`` is the path of the value.
        UnsupportedError: another schema.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT_NAME
        if not path.exists() and not path.is_symlink():
            return None
    if not stat.S_ISREG(path.stat().st_mode):
        raise FormatError("not a regular file", file=str(path))
    raw = read_at_most(path, MAX_REPORT_BYTES)
    with located(file=path):
        if len(raw) > MAX_REPORT_BYTES:
            raise FormatError(
                "report is too long", expected=f"at most {MAX_REPORT_BYTES} bytes", got=path.stat().st_size
            )
        check_values(raw)
        check_width(raw)
        return _report(_Value(_load(raw)))


def _load(raw: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise FormatError("key occurs twice", field=name)
        return table

    def natural(digits: str) -> int:
        if len(digits) > 19:
            raise FormatError("number out of range", expected=f"at most {U32_MAX}", got=digits)
        return int(digits)

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=natural)
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as exc:
        at = exc.pos if isinstance(exc, json.JSONDecodeError) else 0
        raise FormatError("report is not JSON", offset=at, got=str(exc)) from exc
    return document


@dataclass(frozen=True)
class _Value:
    """A JSON value and its path."""

    value: Any
    path: str = ""

    def fail(self, expected: str) -> FormatError:
        return FormatError("not a report", field=self.path or "report", expected=expected, got=_short(self.value))

    def __getitem__(self, name: str) -> _Value:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return _Value(self.value.get(name), f"{self.path}.{name}".lstrip("."))

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.fail("a text")
        return self.value

    def optional(self) -> str | None:
        return None if self.value is None else self.text()

    def count(self) -> int:
        if type(self.value) is not int or not 0 <= self.value <= U32_MAX:
            raise self.fail(f"a number from 0 to {U32_MAX}")
        return self.value

    def items(self, *, optional: bool = False) -> list[_Value]:
        if optional and self.value is None:
            return []
        if not isinstance(self.value, list):
            raise self.fail("a list")
        return [_Value(value, f"{self.path}[{at}]") for at, value in enumerate(self.value)]

    def table(self) -> dict[str, _Value]:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return {name: self[name] for name in self.value}

    def shape(self) -> tuple[int, ...]:
        dims = self.items()
        if len(dims) > MAX_RANK:
            raise self.fail(f"at most {MAX_RANK} dimensions")
        return tuple(dim.count() for dim in dims)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _report(node: _Value) -> Report:
    schema = node["schema"].count()
    if schema != SCHEMA:
        raise UnsupportedError("unknown schema", field="schema", expected=SCHEMA, got=schema)
    node["generated_by"]["tool"].text()
    return Report(
        node["uqff_version"].text(),
        tuple(map(_output, node["outputs"].items())),
        {name: value.text() for name, value in node["generated_by"].table().items() if value.value is not None},
        node["base_model"].optional(),
        node["repo_id"].optional(),
    )


def _output(node: _Value) -> ReportedOutput:
    return ReportedOutput(
        node["quant"].text(),
        tuple(shard.text() for shard in node["shards"].items()),
        node["layers"].count(),
        {kind: count.count() for kind, count in node["actual_counts"].table().items()},
        node["fallback_count"].count(),
        tuple(
            ReportedFallback(
                n["module"].text(), n["from"].text(), n["to"].text(), n["shape"].shape(), n["reason"].optional()
            )
            for n in node["fallbacks"].items(optional=True)
        ),
        tuple(
            LayerEntry(
                n["module"].text(),
                n["stored"].text(),
                n["shape"].shape(),
                n["default_target"].optional(),
                n["resolved_target"].optional(),
            )
            for n in node["layer_details"].items(optional=True)
        ),
    )


def check_report(report: Report, directory: PathLike) -> Iterator[UqffError]:
    """Compare a report with itself and with the names in a directory; opens none of the files.

    Args:
        report: of the directory.
        directory: where the shards must be.

    Yields:
        An error for each broken rule, with ``field`` as in the report: there are outputs; each has a name of its own
        and shards; a shard belongs to one output, is named by a plain file name, and is a regular file there (a link is
        followed, but only to a file beside the directory's own files or in the blob store of a hub cache); counts
        agree.
    """
    directory = Path(directory)
    file = str(directory / REPORT_NAME)
    if not report.outputs:
        yield FormatError("report without outputs", file=file, field="outputs", expected="at least one", got="none")
    owners: dict[str, str] = {}
    quants: set[str] = set()
    for at, output in enumerate(report.outputs):
        where = f"outputs[{at}]"
        if not output.quant.strip() or output.quant in quants:
            yield FormatError("output needs a name of its own", file=file, field=f"{where}.quant", got=output.quant)
        quants.add(output.quant)
        if not output.shards:
            yield FormatError("output without shards", file=file, field=f"{where}.shards", expected="at least one")
        for n, shard in enumerate(output.shards):
            place = f"{where}.shards[{n}]"
            if shard in owners:
                yield FormatError(
                    "shard is named twice", file=file, field=place, got=f"{shard}, also of {owners[shard]}"
                )
            owners.setdefault(shard, output.quant)
            error = _check_shard(directory, shard)
            if error is not None:
                error.field = place
                yield error.within(file=file)
        yield from (error.within(file=file, prefix=where) for error in _check_counts(output))


def _check_shard(directory: Path, shard: str) -> UqffError | None:
    """A shard is a file beside the report: a name that leads elsewhere would make a loader read what it should not."""
    if not shard.endswith(SUFFIX) or any(c in shard for c in "/\\\0:") or shard.startswith(".."):
        return FormatError("shard is not a plain file name", expected=f"NAME{SUFFIX} without a directory", got=shard)
    path = directory / shard
    try:
        plain = stat.S_ISREG(path.lstat().st_mode)
        if path.is_symlink():
            plain = path.resolve(strict=True).is_file() and stays_inside(path)
            if not plain:
                return FormatError("shard is a link out of the directory", got=f"{shard} -> {path.resolve()}")
    except (FileNotFoundError, RuntimeError):
        return ShardError("shard is missing", expected=shard, got="no such file")
    except (OSError, ValueError) as exc:
        return ShardError("shard cannot be looked up", expected=shard, got=str(exc))
    return None if plain else FormatError("shard is not a regular file", got=shard)


def _check_counts(output: ReportedOutput) -> Iterator[UqffError]:
    total = sum(output.actual_counts.values())
    if total != output.layers or not output.layers:
        layers = f"{output.layers} layers, at least one"
        yield FormatError("counts do not add up", field="actual_counts", expected=layers, got=total)
    count = len(output.fallbacks)
    if output.fallback_count != count:
        yield FormatError("wrong count", field="fallback_count", expected=count, got=output.fallback_count)
    if output.layer_details and output.actual_counts != Counter(layer.stored for layer in output.layer_details):
        yield FormatError("counts do not fit the layers", field="actual_counts", got=dict(output.actual_counts))


def check_output(output: ReportedOutput, file: UqffFile) -> Iterator[UqffError]:
    """Compare what a report says of an output with the open file; reads the fields of all layers.

    Yields:
        An error for each difference: names of the shards, layers, their stored types and shapes.
    """
    where = str(file.paths[0].parent / REPORT_NAME)
    actual = build_output(output.quant, file)
    if tuple(output.shards) != actual.shards:
        yield ShardError("other shards", file=where, field="shards", expected=actual.shards, got=output.shards)
    if output.layers != actual.layers:
        yield FormatError("wrong count", file=where, field="layers", expected=actual.layers, got=output.layers)
    counts, said_counts = dict(actual.actual_counts), dict(output.actual_counts)
    if counts != said_counts:
        yield FormatError("wrong counts", file=where, field="actual_counts", expected=counts, got=said_counts)
    said = {layer.module: layer for layer in output.layer_details}
    for layer in actual.layer_details if said else ():
        found = said.pop(layer.module, None)
        if found is None or (found.stored, found.shape) != (layer.stored, layer.shape):
            got = "no such layer" if found is None else f"{found.stored} {list(found.shape)}"
            expected = f"{layer.stored} {list(layer.shape)}"
            yield FormatError(
                "layer is not as reported",
                file=where,
                layer=layer.module,
                field="layer_details",
                expected=expected,
                got=got,
            )
    for module in said:
        yield FormatError("no such layer in the file", file=where, layer=module, field="layer_details")


def build_output(
    quant: str,
    file: UqffFile,
    *,
    targets: Mapping[str, str] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> ReportedOutput:
    """What a report says of an open 1.x file.

    Args:
        quant: name of the output, its default type.
        file: the file; the fields of all layers are read.
        targets: type that was asked for, by layer; not told for layers that are missing here.
        reasons: why a layer is stored plain, by layer.

    Raises:
        UqffError: a layer is broken, or the file is not of 1.x.
    """
    layers: list[LayerEntry] = []
    fallbacks: list[ReportedFallback] = []
    for key in file:
        record, fields = file.fields(key)
        entries = file.entries(key)
        shape = fields["shape"] if "weight.shape" in entries else entries["weight"].shape
        told = (targets or {}).get(key)
        target = told or quant
        weight = record.parse(fields)
        layer = LayerEntry(key, weight.kind, tuple(shape), quant, told)
        layers.append(layer)
        if weight.plain is not None and layer.stored != target:  # from one Q type to another is no fallback
            fallbacks.append(ReportedFallback(key, target, layer.stored, layer.shape, (reasons or {}).get(key)))
    counts = Counter(layer.stored for layer in layers)
    shards = tuple(path.name for path in file.paths)
    return ReportedOutput(
        quant, shards, len(layers), dict(sorted(counts.items())), len(fallbacks), tuple(fallbacks), tuple(layers)
    )


def build_report(
    files: Mapping[str, UqffFile],
    *,
    targets: Mapping[str, Mapping[str, str]] | None = None,
    reasons: Mapping[str, Mapping[str, str]] | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
) -> Report:
    """The report of a directory.

    Args:
        files: name of the output (its default type) to open file.
        targets: see :func:`build_output`, by output.
        reasons: likewise.
        base_model: the model that was quantised.
        repo_id: where the files are published.

    Raises:
        FormatError: there are no files, or files of several versions.
        UqffError: see :func:`build_output`.
    """
    versions: set[Version] = {file.version for file in files.values()}
    if len(versions) != 1:
        got = ", ".join(map(str, sorted(versions))) or "no files"
        raise FormatError("a report is about files of one version", field="uqff_version", got=got)
    outputs = tuple(
        build_output(quant, file, targets=(targets or {}).get(quant), reasons=(reasons or {}).get(quant))
        for quant, file in files.items()
    )
    generated_by = {"tool": "uqff", "uqff_version": __version__}
    return Report(str(versions.pop()), outputs, generated_by, base_model, repo_id)


def report_document(report: Report) -> dict[str, Any]:
    """A report as JSON values, in the order and with the omissions of the engine's."""
    document: dict[str, Any] = {"schema": report.schema, "generated_by": dict(report.generated_by)}
    document |= _present({"base_model": report.base_model, "repo_id": report.repo_id})
    return document | {"uqff_version": report.uqff_version, "outputs": list(map(_output_document, report.outputs))}


def _output_document(output: ReportedOutput) -> dict[str, Any]:
    fallbacks = [
        {"module": f.module, "from": f.requested, "to": f.stored, "shape": list(f.shape)}
        | _present({"reason": f.reason})
        for f in output.fallbacks
    ]
    details = [
        {"module": layer.module}
        | _present({"default_target": layer.default_target, "resolved_target": layer.resolved_target})
        | {"stored": layer.stored, "shape": list(layer.shape)}
        for layer in output.layer_details
    ]
    document = {
        "quant": output.quant,
        "shards": list(output.shards),
        "layers": output.layers,
        "actual_counts": dict(sorted(output.actual_counts.items())),
        "fallback_count": output.fallback_count,
    }
    return document | {name: value for name, value in (("fallbacks", fallbacks), ("layer_details", details)) if value}


def _present(texts: Mapping[str, str | None]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if text is not None}


def write_report(report: Report, directory: PathLike) -> Path:
    """Write the report of a model directory, in place of one that is there; whole or not at all.

    Returns:
        Path of the report.

    Raises:
        FormatError: a name in it is not Unicode.
    """
    path = Path(directory) / REPORT_NAME
    raw = json_bytes(report_document(report), path)
    with atomic_file(path) as file:
        file.write(raw)
    return path
