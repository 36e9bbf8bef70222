"""The report of a 1.x model directory, made anew from its files, and whether the one that is there agrees with them.

Files tell the type that each layer has, not the one that was asked for: what an older report says of that is kept for
layers that still have the type it names.

Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/uqff/report.rs`` (``resolve_uqff_groups``, ``build_output_report``).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from uqff.container.document import is_present
from uqff.container.file import UqffFile, open_uqff
from uqff.container.report import (
    REPORT_NAME,
    Report,
    ReportedOutput,
    build_report,
    check_output,
    check_report,
    read_report,
    write_report,
)
from uqff.container.shards import NUMBERED, SUFFIX, PathLike, resolve, select
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError
from uqff.hub.names import is_hub_name
from uqff.inspection.checksum import SUMS_NAME, read_sums, write_sums
from uqff.inspection.digests import digest_files
from uqff.inspection.remote import looked_into
from uqff.progress import Progress, Steps
from uqff.schema.entries import FIRST

__all__ = ["ReportCheck", "check_directory", "rebuild_report", "report"]


@dataclass(frozen=True)
class ReportCheck:
    """The report of a directory, and whether it fits the files.

    Attributes:
        directory: of the model.
        report: the one that is there; what it would say if there is none; the new one if it was written.
        found: whether there was one.
        written: whether it was made anew.
        problems: where it does not fit the files.
    """

    directory: Path
    report: Report
    found: bool
    written: bool
    problems: tuple[UqffError, ...]


def report(
    path: PathLike,
    *,
    write: bool = False,
    base_model: str | None = None,
    repo_id: str | None = None,
    isq: str | None = None,
    progress: Progress | None = None,
) -> ReportCheck:
    """The ``uqff_report.json`` of a 1.x model directory, checked against the files beside it, or made anew.

    Args:
        path: a model directory; or a ``.uqff`` file in one, or ``DIR:TYPE``: what the report says of that model. Of a
            model on the hub, headers and small fields are read by ranges.
        write: make it anew from the files; what they do not tell is taken from the one that is there. If a
            ``SHA256SUMS`` beside it names the report, that line gets the new digest.
        base_model: the model that was quantised, for a new report.
        repo_id: where the files are published, likewise.
        isq: of a directory with several models, the type of the one that is meant.
        progress: called after each output.

    Raises:
        UnsupportedError: files before 1.0, which have no report; or to write one about a part of a directory.
        UqffError: the files break a rule, or the report does and is not to be written.
        OSError: a file cannot be read or written.

    >>> found = uqff.report("model")
    >>> found.problems, found.report.outputs[0].actual_counts
    ((), {'q4k': 28, 'q6k': 1})
    """
    if write and is_hub_name(path):
        raise UnsupportedError("a report is written into a directory", got=os.fspath(path))
    with looked_into(path, isq) as looked:
        chosen = select(looked.path, looked.isq)
        return looked.shown(_report(chosen, write=write, base_model=base_model, repo_id=repo_id, progress=progress))


def _report(
    directory: Path, *, write: bool, base_model: str | None, repo_id: str | None, progress: Progress | None
) -> ReportCheck:
    only = None
    if not directory.is_dir():
        only = {each.name for each in resolve(directory)[0]}
        if write:
            raise UnsupportedError("a report is about all models of a directory", file=str(directory))
        directory = directory.parent
    try:
        stated = read_report(directory)
    except UqffError:
        if not write:
            raise
        stated = None
    problems: tuple[UqffError, ...] = ()
    if write or stated is None:
        shown = rebuild_report(directory, stated, base_model=base_model, repo_id=repo_id)
    else:
        shown, problems = stated, tuple(check_directory(directory, stated, only=only))
    if only is not None:
        shown = replace(shown, outputs=tuple(each for each in shown.outputs if not only.isdisjoint(each.shards)))
    steps = Steps(progress, "report", len(shown.outputs), sum(each.layers for each in shown.outputs), "layers")
    for output in shown.outputs:
        steps.add(output.quant, output.layers)
    if write:
        _write(shown, directory)
    return ReportCheck(directory, shown, stated is not None, write, problems)


def _write(report: Report, directory: Path) -> None:
    """Write the report, and its new digest into the list of checksums if that names it; all else there stays."""
    listed = directory / SUMS_NAME
    named = is_present(listed) and REPORT_NAME in read_sums(listed)  # a list with an error is refused before all else
    write_report(report, directory)
    if named:
        (digest,) = digest_files(directory, [REPORT_NAME])
        text = listed.read_bytes().decode("utf-8", "surrogateescape")
        write_sums(listed, re.sub(rf"(?m)^[0-9a-fA-F]{{64}}(?= [ *]{re.escape(REPORT_NAME)}\r?$)", digest.sha256, text))


def rebuild_report(
    directory: PathLike, known: Report | None = None, *, base_model: str | None = None, repo_id: str | None = None
) -> Report:
    """What the report of a directory has to say.

    Args:
        directory: of a 1.x model. Files ``<name>-N.uqff`` are one output of that name, as is a single ``<name>.uqff``;
            those that ``known`` names, the output it says.
        known: an older report of it, for what files do not tell.
        base_model: the model that was quantised; what ``known`` says if None.
        repo_id: where the files are published; likewise.

    Raises:
        UqffError: there are no ``.uqff`` files, or they break a rule, or are not of 1.x.
        OSError: a file cannot be read.
    """
    directory = Path(directory)
    outputs = {} if known is None else {output.quant: output for output in known.outputs}
    with contextlib.ExitStack() as stack:
        files = {}
        for quant, paths in _groups(directory, known).items():
            files[quant] = stack.enter_context(open_uqff(paths))
            if files[quant].version < FIRST:
                raise UnsupportedError(
                    "files before 1.0 have no report", file=str(paths[0]), expected="1.0 or later", got="0.x"
                )
        told = {quant: _told(outputs[quant], file) for quant, file in files.items() if quant in outputs}
        made = build_report(
            files,
            targets={quant: targets for quant, (targets, _) in told.items()},
            reasons={quant: reasons for quant, (_, reasons) in told.items()},
            base_model=base_model or (known.base_model if known is not None else None),
            repo_id=repo_id or (known.repo_id if known is not None else None),
        )
    order = {quant: at for at, quant in enumerate(outputs)}
    return replace(made, outputs=tuple(sorted(made.outputs, key=lambda each: (order.get(each.quant, len(order)),))))


def _groups(directory: Path, known: Report | None) -> dict[str, list[Path]]:
    """The files of each output: those that the report names, and by their own names what it does not."""
    names = sorted(path.name for path in directory.iterdir() if path.name.endswith(SUFFIX) and is_present(path))
    if not names:
        raise ShardError(f"no {SUFFIX} file in the directory", file=str(directory))
    owners = {shard: output.quant for output in (known.outputs if known is not None else ()) for shard in output.shards}
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        stem, number = (name.removesuffix(SUFFIX), 0) if match is None else (match["stem"], int(match["number"]))
        groups.setdefault(owners.get(name, stem), []).append((number, name))
    return {quant: [directory / name for _, name in sorted(group)] for quant, group in groups.items()}


def _told(output: ReportedOutput, file: UqffFile) -> tuple[dict[str, str], dict[str, str]]:
    """Targets and reasons of a report, for layers that have the type that it says."""
    stored = {layer.module: layer for layer in output.layer_details}
    kept = {}
    for key in file:
        record, fields = file.fields(key)
        layer = stored.get(key)
        if layer is not None and layer.resolved_target and layer.stored == record.parse(fields).kind:
            kept[key] = layer.resolved_target
    reasons = {each.module: each.reason for each in output.fallbacks if each.reason and each.module in kept}
    return kept, reasons


def check_directory(directory: PathLike, report: Report, *, only: Set[str] | None = None) -> Iterator[UqffError]:
    """Compare a report with itself, with the directory, and with what is in the files.

    Args:
        directory: of the model.
        report: that stands in it.
        only: names of the shards of one model; then the files of the others are not read.

    Yields:
        An error for each difference; a file that no output owns is one.

    Raises:
        OSError: a file cannot be read.
    """
    directory = Path(directory)
    problems = list(check_report(report, directory))
    yield from problems
    owned = {shard for output in report.outputs for shard in output.shards}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        if path.name not in owned and (only is None or path.name in only):
            yield FormatError("file is of no output", file=str(directory / REPORT_NAME), field="outputs", got=path.name)
    for at, output in enumerate(report.outputs):
        if only is not None and only.isdisjoint(output.shards):
            continue
        # A name that leads elsewhere is not followed.
        if any((problem.field or "").startswith(f"outputs[{at}].shards") for problem in problems):
            continue
        try:
            with open_uqff([directory / shard for shard in output.shards]) as file:
                yield from _check_version(report, file)
                yield from check_output(output, file)
        except UqffError as error:
            yield error


def _check_version(report: Report, file: UqffFile) -> Iterator[UqffError]:
    if str(file.version) != report.uqff_version:
        yield FormatError(
            "other version",
            file=str(file.paths[0].parent / REPORT_NAME),
            field="uqff_version",
            expected=file.version,
            got=report.uqff_version,
        )
