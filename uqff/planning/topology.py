r"""An assignment as the engine's topology YAML: what ``uqff quantize --recipe`` and the engine's ``topology=`` read.

Each layer is found by its whole name; blocks whose projection gets the same type stand in one rule::

    '/^model\.layers\.(?:0|1|7)\.mlp\.down_proj\.weight$/':
      isq: q5k
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["topology"]

_BLOCK = re.compile(r"(.*?\.)([0-9]+)(\..*)")


def topology(kinds: Mapping[str, str]) -> str:
    """The YAML document.

    Args:
        kinds: by the name of a layer's weight in the checkpoint, without ``.weight``.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, kind in kinds.items():
        match = _BLOCK.fullmatch(name)
        before, block, after = match.groups() if match else (name, "", "")
        groups.setdefault((before, after, kind), []).append(block)
    lines = []
    for (before, after, kind), blocks in groups.items():
        middle = blocks[0] if len(blocks) == 1 else f"(?:{'|'.join(blocks)})"
        lines.append(f"'/^{_escaped(before)}{middle}{_escaped(after)}\\.weight$/':\n  isq: {kind}\n")
    return "".join(lines)


def _escaped(text: str) -> str:
    """For a pattern in single quotes."""
    return re.sub(r"([^A-Za-z0-9_'-])", r"\\\1", text).replace("'", "''")
