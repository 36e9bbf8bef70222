"""What another implementation makes of the vectors: it is run on each, and its report compared with the index.

The command gets the files of a case in place of ``{file}`` (or behind its arguments) and prints one JSON object::

    {"outcome": "accept", "layers": [
        {"key": "0" or "lm_head" or null of a blob, "kind": "q4_0", "shape": [3, 32],
         "float32": hexadecimal of all weights as little-endian f32, row major,
         "bias": null or {"dtype": "F32", "shape": [3], "float32": hexadecimal}}]}
    {"outcome": "refuse", "rule": "BLOB-07"}

``rule`` may be missing: which of several broken rules is reported is the reader's choice, so another one than the
vector's is counted, and no mistake.  What else it says is not looked at, and neither is its exit status.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tools.vectors.index import ENCODER, INDEX, REFUSE

PLACEHOLDER: Final = "{file}"
TIMEOUT: Final = 60
"""Seconds that a reader may take for a file of some kilobytes."""


class Outcome(NamedTuple):
    """A case and what is wrong with the report on it; nothing if ``problem`` is None."""

    case: Mapping[str, Any]
    problem: str | None
    rule: str | None = None
    """The rule that it names for a refusal, if it does."""


def read_index(vectors: Path) -> list[dict[str, Any]]:
    """The cases of ``vectors/index.json``."""
    index: list[dict[str, Any]] = json.loads((vectors / INDEX).read_text("utf-8"))
    return index


def run_all(command: str, vectors: Path, classes: Iterable[str] = ()) -> Iterator[Outcome]:
    """Run a command on every case of some classes, all readers' if none are named."""
    wanted = set(classes)
    for case in read_index(vectors):
        if case["class"] != ENCODER and (not wanted or case["class"] in wanted):
            report = _run(command, [vectors / file for file in case["files"]])
            rule = report.get("rule") if isinstance(report, dict) else None
            yield Outcome(case, _problem(case, vectors, report), rule if isinstance(rule, str) else None)


def command_line(command: str, files: Sequence[Path]) -> list[str]:
    """The command's words, with the files in their place, or at the end."""
    words, paths = shlex.split(command), list(map(str, files))
    if PLACEHOLDER not in words:
        return words + paths
    at = words.index(PLACEHOLDER)
    return [*words[:at], *paths, *words[at + 1 :]]


def _run(command: str, files: Sequence[Path]) -> dict[str, Any] | str:
    try:
        done = subprocess.run(command_line(command, files), capture_output=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"took more than {TIMEOUT} s"
    except OSError as error:
        return str(error)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return f"no JSON on standard output, exit status {done.returncode}: {''.join(last)}"
    return report if isinstance(report, dict) else "no JSON object on standard output"


def _problem(case: Mapping[str, Any], vectors: Path, report: dict[str, Any] | str) -> str | None:
    if isinstance(report, str):
        return report
    if report.get("outcome") != case["outcome"]:
        return f"{report.get('outcome')} instead of {case['outcome']}"
    if case["outcome"] == REFUSE:
        return None
    layers = report.get("layers")
    if not isinstance(layers, list):
        return "no layers"
    return _difference(_wanted(case, vectors), [_layer(each) for each in layers])


class _Layer(NamedTuple):
    key: str | None
    kind: str
    shape: tuple[int, ...]
    weights: str
    """sha256 of the numbers."""
    bias: tuple[str, tuple[int, ...], str] | None


def _layer(found: Mapping[str, Any]) -> _Layer:
    bias = found.get("bias")
    return _Layer(
        found.get("key"),
        str(found.get("kind")),
        tuple(found.get("shape", ())),
        _sha256(found.get("float32", "")),
        None if bias is None else (bias["dtype"], tuple(bias["shape"]), bias["float32"].lower()),
    )


def _sha256(numbers: str) -> str:
    return hashlib.sha256(bytes.fromhex(numbers)).hexdigest()


def _wanted(case: Mapping[str, Any], vectors: Path) -> list[_Layer] | list[str]:
    """The layers that a reader must find; of files of blobs, whose descriptions tell no more, their keys."""
    described = json.loads((vectors / case["description"]).read_text("utf-8"))
    if isinstance(described, list):
        name = Path(case["files"][0]).name
        layers = next(each["layers"] for each in described if each["file"] == name)
        return sorted((str(each["key"]) for each in layers), key=int)
    return sorted(
        _Layer(
            each.get("key"),
            each["kind"],
            tuple(each["shape"]),
            each["float32"]["sha256"],
            None
            if each["bias"] is None
            else (each["bias"]["dtype"].replace("F8_", "F8"), tuple(each["bias"]["shape"]), each["bias"]["float32"]),
        )
        for each in described.get("layers", [described])
    )


def _difference(wanted: list[_Layer] | list[str], found: list[_Layer]) -> str | None:
    if wanted and isinstance(wanted[0], str):
        keys = sorted((str(each.key) for each in found), key=int)
        return None if keys == wanted else f"layers {keys} instead of {wanted}"
    found = sorted(found)
    if [each.key for each in wanted] != [each.key for each in found]:  # type: ignore[union-attr]
        return f"layers {[each.key for each in found]}"
    for want, got in zip(wanted, found, strict=True):
        for name, one, other in zip(_Layer._fields, want, got, strict=True):
            if one != other:
                return f"{got.key}: {name} {other} instead of {one}"
    return None


def summary(outcomes: Sequence[Outcome]) -> list[tuple[str, str, int, int]]:
    """Class, outcome, number of cases, and how many of them are right."""
    total = Counter((each.case["class"], each.case["outcome"]) for each in outcomes)
    right = Counter((each.case["class"], each.case["outcome"]) for each in outcomes if each.problem is None)
    return [(name, outcome, count, right[name, outcome]) for (name, outcome), count in sorted(total.items())]


class Rule(NamedTuple):
    """What a reader makes of the vectors that break a rule, or the rules of some letters."""

    name: str
    vectors: int
    refused: int
    named: int
    """Refused with the id of the rule."""


def by_rule(outcomes: Sequence[Outcome], *, letters: bool = False) -> list[Rule]:
    """Each rule of the vectors that were tried; or the rules of the same letters together."""
    groups: dict[str, list[Outcome]] = {}
    for each in outcomes:
        if each.case["outcome"] == REFUSE:
            rule = each.case["rule"]
            groups.setdefault(rule.partition("-")[0] if letters else rule, []).append(each)
    return [
        Rule(
            name,
            len(group),
            sum(each.problem is None for each in group),
            sum(each.problem is None and each.rule == each.case["rule"] for each in group),
        )
        for name, group in sorted(groups.items())
    ]


def lines_of(outcomes: Sequence[Outcome], *, every_rule: bool = False) -> Iterator[str]:
    """The report in lines: what is wrong, with the rule; then the summary by class, and by rule.

    Args:
        outcomes: of all cases.
        every_rule: give each rule a line, not the rules of the same letters together.
    """
    for case, problem, _ in outcomes:
        if problem is not None:
            refused = case["outcome"] == REFUSE
            about = f"{case['rule']}: {case['words']}" if refused else case["description"]
            yield f"{case['id']}: {problem} ({about})"
    for name, outcome, count, right in summary(outcomes):
        yield f"{name}, {outcome}: {right} of {count}"
    for rule in by_rule(outcomes, letters=not every_rule):
        yield f"{rule.name}: {rule.refused} of {rule.vectors} refused, {rule.named} with the id of the rule"
