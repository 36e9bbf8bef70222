r"""Recipes: which layer gets which type, in the engine's topology YAML.

::

    0-8:                    decoder layers 0 to 7: the end is exclusive
      isq: q6k
    31:                     one decoder layer
      isq: q8_0
    '/\.down_proj\.weight$/':
      isq: q5k              every weight whose name the pattern is found in

Of patterns that match, the last in the file counts, and any pattern counts before any range.  Of ranges, the one with
the higher end counts; of equal ends the later.  What nothing selects gets the default type.  An entry without ``isq``
leaves its layers unquantised for engine 0.6 and at the default for later ones, which pass a pattern over that has no
``device`` either.  ``device`` counts where a model is loaded by the recipe (:mod:`uqff.parallel.elsewhere`) and is
ignored by what writes files.  ``isq: unquant``, which the engine does not know, says it
plainly.

The name of a weight is the checkpoint's.  The experts of a projection, one layer in 1.x, are called by that of the
first, ``...experts.0.w1.weight``, and where all are one tensor by that, ``...experts.gate_up_proj.weight``; never by
the path that the layer has in the file.

The file is data: aliases, tags and repeated keys are refused, and patterns are matched in linear time.

Authority: mistral.rs v0.6.0 and v0.9.2, ``mistralrs-core/src/topology/mod.rs``; v0.9.2, ``mistralrs-quant/src/lib.rs``
(``resolve_immediate_isq``); ``mistralrs-core/src/moe/experts/backends.rs`` (``load_unquantized``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uqff.container.document import read_at_most
from uqff.container.shards import PathLike
from uqff.errors import FormatError, located
from uqff.families import PLAIN_KIND
from uqff.limits import MAX_MODEL_LAYERS, MAX_RECIPE_BYTES, MAX_RECIPE_RULES
from uqff.models.architectures import LayerName
from uqff.models.patterns import Pattern
from uqff.quantization.types import kind_name

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node

__all__ = ["Recipe", "RecipeRule", "load_recipe", "parse_recipe"]

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_DEVICE = re.compile(r"cpu|(?:cuda|metal)\[[0-9]{1,9}\]")
_NULL = "tag:yaml.org,2002:null"
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp")}
"""What an unquoted scalar may be taken for; its text is used as it is written."""


@dataclass(frozen=True)
class RecipeRule:
    """One entry of a recipe.

    Attributes:
        selector: as it stands in the file.
        kind: ISQ name or ``unquant``; None if the entry has no ``isq``.
        line: of the file, from 1.
        span: decoder layers from the first number to before the second, None for a pattern.
        pattern: None for a range.
        device: as it stands in the file; None if the entry has none.
    """

    selector: str
    kind: str | None
    line: int
    span: tuple[int, int] | None = None
    pattern: Pattern | None = None
    device: str | None = None

    def selects(self, layer: LayerName) -> bool:
        """Whether the rule is about that layer."""
        if self.pattern is not None:
            return self.pattern.search(f"{layer.module}.weight")
        assert self.span is not None
        return layer.block is not None and self.span[0] <= layer.block < self.span[1]


class Recipe:
    """The rules of a recipe, those that count first in front."""

    def __init__(self, rules: Iterable[RecipeRule]) -> None:
        """Order the rules; they are given in the order of the file."""
        rules = list(rules)
        patterns = [rule for rule in reversed(rules) if rule.pattern is not None]
        # Stable: of equal ends the later rule, now in front, stays in front.
        ranges = sorted((r for r in reversed(rules) if r.span is not None), key=lambda r: -(r.span or (0, 0))[1])
        self.rules = (*patterns, *ranges)

    def kind_for(self, layer: LayerName, default: str, *, engine: str = "0.9") -> str:
        """The type asked for a layer: that of the first rule that selects it, else the default."""
        return self.explicit_kind(layer, engine=engine) or default

    def explicit_kind(self, layer: LayerName, *, engine: str = "0.9") -> str | None:
        """The type that the first rule asks for that selects a layer; None if it is the default."""
        for rule in self.rules:
            empty = rule.pattern is not None and rule.kind is None and rule.device is None
            if rule.selects(layer) and (engine == "0.6" or not empty):
                return rule.kind or (PLAIN_KIND if engine == "0.6" else None)
        return None

    def unmatched(self, layers: Iterable[LayerName]) -> list[RecipeRule]:
        """The rules that select none of the layers, in the order of the file."""
        missing = list(self.rules)
        for layer in layers:
            missing = [rule for rule in missing if not rule.selects(layer)]
        return sorted(missing, key=lambda rule: rule.line)


def load_recipe(path: PathLike) -> Recipe:
    """Read a recipe from a file; see :func:`parse_recipe`.

    Raises:
        OSError: the file cannot be read.
    """
    return parse_recipe(read_at_most(Path(path), MAX_RECIPE_BYTES), str(Path(path)))


def parse_recipe(text: str | bytes, file: str | None = None) -> Recipe:
    """Parse a recipe.

    Args:
        text: the YAML document.
        file: its name, for errors.

    Raises:
        FormatError: naming line and reason.
    """
    with located(file=file):
        if len(text) > MAX_RECIPE_BYTES:
            raise FormatError("recipe is too long", expected=f"at most {MAX_RECIPE_BYTES} bytes", got=len(text))
        return Recipe(_rules(_document(text)))


def _document(text: str | bytes) -> MappingNode:
    import yaml

    try:
        depth = texts = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _error("anchors and aliases are not allowed", event)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                raise _error("too deeply nested", event, "selectors, each with isq and device")
            # A selector, and two keys with a value each: what has more texts is not made a document of.
            texts += isinstance(event, yaml.ScalarEvent)
            if texts > 5 * MAX_RECIPE_RULES:
                raise _error("too many selectors", event, f"at most {5 * MAX_RECIPE_RULES} texts")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else None
        problem = getattr(exc, "problem", None) or str(exc)
        raise FormatError("recipe is not YAML", field=where, got=problem) from exc
    if not isinstance(node, yaml.MappingNode):
        if node is None:
            raise FormatError("recipe is empty", field="line 1")
        raise _error("recipe is not a map", node, "selectors, each with isq and device")
    if len(node.value) > MAX_RECIPE_RULES:
        raise _error("too many selectors", node.value[MAX_RECIPE_RULES][0], f"at most {MAX_RECIPE_RULES}")
    return node


def _error(problem: str, at: Any, expected: object = None, got: object = None) -> FormatError:
    return FormatError(problem, field=f"line {at.start_mark.line + 1}", expected=expected, got=got)


def _rules(document: MappingNode) -> list[RecipeRule]:
    rules = [_rule(key, _text(key), value) for key, value in document.value]
    seen: dict[str, RecipeRule] = {}
    for rule, (key, _) in zip(rules, document.value, strict=True):
        if rule.selector in seen:
            raise _error("selector occurs twice", key, got=f"{rule.selector}, also in line {seen[rule.selector].line}")
        seen[rule.selector] = rule
    return rules


def _text(node: Node) -> str:
    """The text of a scalar as it is written."""
    value = node.value
    if not isinstance(value, str) or node.tag not in _PLAIN:
        raise _error("not a plain text", node)
    return value


def _rule(key: Node, selector: str, value: Node) -> RecipeRule:
    line = key.start_mark.line + 1
    kind, device = _entry(value)
    if len(selector) >= 2 and selector.startswith("/") and selector.endswith("/"):
        try:
            return RecipeRule(selector, kind, line, pattern=Pattern(selector[1:-1]), device=device)
        except FormatError as error:
            raise _error(error.problem, key, got=selector) from error
    match = _RANGE.fullmatch(selector)
    if match is None:
        raise _error("unknown selector", key, "a number, START-END, or /pattern/", selector)
    start = int(match[1])
    end = start + 1 if match[2] is None else int(match[2])
    if not start < end <= MAX_MODEL_LAYERS:
        raise _error("empty range", key, f"an end after {start}, which it does not include", selector)
    return RecipeRule(selector, kind, line, span=(start, end), device=device)


def _entry(node: Node) -> tuple[str | None, str | None]:
    """Type and device of an entry; checks everything in it."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise _error("entry is not a map", node, "isq: TYPE")
    kind: str | None = None
    device: str | None = None
    seen: set[str] = set()
    for key, value in node.value:
        name = _text(key)
        if name in seen:
            raise _error("key occurs twice", key, got=name)
        seen.add(name)
        text = None if value.tag == _NULL else _text(value)
        if name == "isq" and text is not None:
            try:
                kind = kind_name(text)
            except Exception as error:
                raise _error("unknown type", value, getattr(error, "expected", None), text) from error
        elif name == "device" and text is not None:
            if not _DEVICE.fullmatch(text):
                raise _error("unknown device", value, "cpu, cuda[N] or metal[N]", text)
            device = text
        elif name not in ("isq", "device"):
            raise _error("unknown key", key, "isq or device", name)
    return kind, device
