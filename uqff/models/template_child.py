"""Render a chat template in a process of its own, which :func:`uqff.models.template.render` starts.

A template is a program of whoever made the model directory.  Jinja's sandbox keeps it from everything but computing;
how much it computes and how much memory it takes is bounded here, by the operating system, because a template has a
thousand ways to be long (``'a' * 10**9``, ``'a'.ljust(10**9)``, loops in loops, a string doubled forty times).

Run as a file with ``-I -S``: it imports nothing but Jinja and the standard library, of the paths that it is given, and
``system.py`` of this package.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def bound(seconds: float, memory: int) -> None:
    """Let this process end after ``seconds`` of processor time, and get ``memory`` more bytes of addresses at most."""
    spec = spec_from_file_location("uqff_system", Path(__file__).parent.parent / "system.py")
    assert spec is not None
    assert spec.loader is not None
    system = module_from_spec(spec)
    spec.loader.exec_module(system)
    system.bound_template(seconds, memory)


def environment() -> Any:
    """Jinja as ``transformers`` sets it up for chat templates: the same options, filters, functions and tags."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks what an assistant says, for training; it renders as its contents."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render(asked: dict[str, Any]) -> dict[str, Any]:
    """The text, or what went wrong."""
    made = environment()
    bound(asked["seconds"], asked["memory"])
    parts, length = [], 0
    try:
        for part in made.from_string(asked["template"]).generate(**asked["variables"]):
            parts.append(part)
            length += len(part)
            if length > asked["longest"]:
                return {"long": True}
        return {"text": "".join(parts)}
    except MemoryError:
        return {"memory": True}
    except Exception as error:  # noqa: BLE001  (whatever a template does is reported)
        return {"error": f"{error}"[:400] or type(error).__name__}


if __name__ == "__main__":
    request = json.loads(sys.stdin.buffer.read())
    sys.path[:] = request["path"]
    sys.stdout.write(json.dumps(render(request)))
