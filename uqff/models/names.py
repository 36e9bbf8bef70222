"""Index to weight path: which layer of a pre-1.0 file is which weight, and the proof that it can be.

The names come from the architecture that ``config.json`` tells (:mod:`uqff.models.architectures`), or from a file::

    # comment
    0 lm_head
    1 model.layers.0.self_attn.q_proj
    ...
    9 model.layers.0.mlp.experts.gate_proj[0]
    12 model.layers.0.mlp.experts.gate_proj[1]

one layer a line: its index, the path of its weight without ``.weight``, and behind the path of a stack of experts the
number of the expert.  The same as JSON is ``{"0": "lm_head", ...}``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uqff.container.shards import PathLike
from uqff.errors import FormatError, ShapeError, located
from uqff.limits import MAX_CONFIG_BYTES, MAX_MODEL_LAYERS
from uqff.models.architectures import LayerName, check_numbered, layer_names, stacked_names
from uqff.models.shapes import expected_shape, shape_label

__all__ = ["check_residual", "check_shapes", "known_names", "parse_names", "read_names", "with_stacked_experts"]

LINE = re.compile(r"(?P<index>[0-9]{1,9})\s+(?P<path>\S+)")
PATH = re.compile(r"(?P<key>[^\[\]\s]+)(?:\[(?P<expert>[0-9]{1,6})\])?")
BLOCK = re.compile(r"(?P<stack>(?:.*\.)?layers)\.(?P<block>[0-9]{1,9})\.")


def known_names(config: Mapping[str, Any], shapes: Mapping[int, tuple[int, ...]]) -> list[LayerName]:
    """The names of a file's layers by its architecture.

    Args:
        config: the parsed ``config.json``.
        shapes: of the layers, by index.

    Returns:
        By index.  Experts have a layer each, or, if that is what the file has, one for all (as builds of the engine for
        Metal and CUDA have it).

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the file has another number of layers.
        ShapeError: a layer has not the shape of its weight.
    """
    check_numbered(config)
    names = layer_names(config)
    stacked = with_stacked_experts(names)
    if len(shapes) == len(stacked) != len(names):
        names = stacked
    if set(shapes) != set(range(len(names))):
        kinds = (
            f"{len(names)}" if len(stacked) == len(names) else f"{len(names)}, or {len(stacked)} with stacked experts"
        )
        missing = next((str(index) for index in range(len(names)) if index not in shapes), None)
        extra = next((str(index) for index in sorted(shapes) if index >= len(names)), None)
        odd = f", {missing} is missing" if missing is not None else f", {extra} is none of them"
        raise FormatError(
            "the file is not of this model: wrong number of layers",
            layer=missing or extra,
            field="config.num_hidden_layers",
            expected=f"{kinds} by config.json",
            got=f"{len(shapes)}{odd}",
        )
    check_shapes(config, names, shapes)
    return names


def with_stacked_experts(names: Sequence[LayerName]) -> list[LayerName]:
    """The layers of a model as builds of the engine for Metal and CUDA number them: one for all experts."""
    made: list[LayerName] = []
    for entry in stacked_names(names):
        first = replace(entry.parts[0], index=len(made))
        if entry.is_stacked:
            first = replace(first, module=entry.key, weight=f"{entry.key}.weight", expert=None)
        made.append(first)
    return made


def check_shapes(config: Mapping[str, Any], names: Iterable[LayerName], shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Compare the shapes of layers with what the configuration says of their weights.

    Raises:
        ShapeError: the first that differs.
    """
    for name in names:
        expected, got = expected_shape(config, name), shapes[name.index]
        if expected is None:
            continue
        if len(expected) != len(got) or any(a not in (None, b) for a, b in zip(expected, got, strict=True)):
            raise ShapeError(
                "the layer is not this weight",
                layer=str(name.index),
                expected=f"{name.module} {shape_label(expected)} by config.json",
                got=list(got),
            )


def check_residual(
    names: Sequence[LayerName], residual: Mapping[str, tuple[int, ...]], shapes: Mapping[int, tuple[int, ...]]
) -> None:
    """Compare the layers of a pre-1.0 file with the tensors beside it.

    Args:
        names: of the layers.
        residual: shapes of the tensors of ``residual.safetensors``; none if there is no such file.
        shapes: of the layers, by index.

    Raises:
        FormatError: a weight is both, or decoder layers of one are not in the other.
        ShapeError: the head has not the shape of the embedding.
    """
    if not residual:
        return
    blocks: dict[tuple[str, int], int] = {}
    for name in names:
        if f"{name.module}.weight" in residual:
            raise FormatError(
                "weight is a layer and in the residual, too",
                layer=str(name.index),
                expected=f"{name.module} in one of them",
            )
        for place in _places(name.module):
            blocks.setdefault(place, name.index)
    stacks = {stack for stack, _ in blocks}
    found = {place for tensor in residual for place in _places(tensor) if place[0] in stacks}
    if found and found != blocks.keys():
        stack, block = odd = min(found ^ blocks.keys())
        raise FormatError(
            "the residual is of another model",
            layer=str(blocks[odd]) if odd in blocks else None,
            field=f"{stack}.{block}",
            expected="the same decoder layers in both",
            got=f"none in the {'residual' if odd in blocks else 'file'}",
        )
    head = names[0]
    rows = next((shape for name, shape in residual.items() if name.endswith("model.embed_tokens.weight")), None)
    if head.module.endswith("lm_head") and rows is not None and rows != shapes[head.index]:
        raise ShapeError(
            "the layer is not this weight",
            layer=str(head.index),
            expected=f"{head.module} {list(rows)}, as the embedding in the residual",
            got=list(shapes[head.index]),
        )


def _places(name: str) -> Iterable[tuple[str, int]]:
    """The stack of decoder layers that a tensor is of, and its number there, if of any."""
    match = BLOCK.match(name)
    return [(match["stack"], int(match["block"]))] if match else []


def read_names(path: PathLike) -> list[LayerName]:
    """The names of a file; see the module.

    Raises:
        FormatError: the file breaks a rule; ``field`` is the line or the index.
        OSError: it cannot be read.
    """
    with open(Path(path), "rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    with located(file=path):
        if len(raw) > MAX_CONFIG_BYTES:
            raise FormatError("file is too long", expected=f"at most {MAX_CONFIG_BYTES} bytes")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise FormatError("text is not Unicode", offset=exc.start) from exc
        return parse_names(text)


def parse_names(text: str) -> list[LayerName]:
    """The names of a text; see the module.

    Raises:
        FormatError: a line that is none, an index missing or twice, a path twice, experts with a gap.
    """
    pairs = _json_pairs(text) if text.lstrip().startswith("{") else _line_pairs(text)
    paths: dict[int, LayerName] = {}
    for index, path, where in pairs:
        name = _name(index, path, where)
        if index in paths:
            raise FormatError("index occurs twice", field=where, got=index)
        paths[index] = name
    if not paths or len(paths) > MAX_MODEL_LAYERS:
        raise FormatError("wrong number of names", expected=f"1 to {MAX_MODEL_LAYERS}", got=len(paths))
    names = [paths[index] for index in sorted(paths)]
    gap = next((at for at, name in enumerate(names) if name.index != at), None)
    if gap is not None:
        raise FormatError("index is missing", field=str(gap), expected=f"all from 0 to {names[-1].index}")
    _check_unique(names)
    return names


def _line_pairs(text: str) -> Iterable[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        match = LINE.fullmatch(content)
        if content and match is None:
            raise FormatError("not a name", field=f"line {number}", expected="INDEX PATH", got=content)
        if match:
            yield int(match["index"]), match["path"], f"line {number}"


def _json_pairs(text: str) -> Iterable[tuple[int, str, str]]:
    def pairs(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return items

    try:
        items = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as exc:
        raise FormatError("not JSON", got=str(exc)) from exc
    for index, path in items:
        if not re.fullmatch(r"[0-9]{1,9}", index) or not isinstance(path, str):
            raise FormatError("not a name", field=index, expected='"INDEX": "PATH"', got=path)
        yield int(index), path, index


def _name(index: int, path: str, where: str) -> LayerName:
    match = PATH.fullmatch(path)
    if match is None or match["key"].isdecimal() or match["key"].endswith(".weight"):
        raise FormatError(
            "not the path of a weight", field=where, expected="a path without .weight, or PATH[EXPERT]", got=path
        )
    key, expert = match["key"], match["expert"]
    if expert is None:
        return LayerName(index, key, f"{key}.weight", None)
    return LayerName(index, path, f"{path}.weight", None, int(expert), key)


def _check_unique(names: Sequence[LayerName]) -> None:
    modules = Counter(name.module for name in names)
    for name in names:
        if modules[name.module] > 1 or (name.stacked in modules):
            raise FormatError("path occurs twice", field=str(name.index), got=name.module)
    experts: dict[str, set[int]] = {}
    for name in names:
        if name.stacked is not None and name.expert is not None:
            experts.setdefault(name.stacked, set()).add(name.expert)
    for key, numbers in experts.items():
        if numbers != set(range(len(numbers))):
            missing = next(n for n in range(len(numbers)) if n not in numbers)
            raise FormatError("expert is missing", layer=key, expected=f"{key}[{missing}]", got=f"up to {max(numbers)}")
