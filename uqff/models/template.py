"""Chat templates, rendered as ``transformers`` renders them, but bounded in time, memory and length."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from uqff.errors import FormatError, UnsupportedError
from uqff.limits import MAX_TEMPLATE_BYTES, MAX_TEMPLATE_MEMORY, MAX_TEMPLATE_SECONDS, MAX_TEMPLATE_TEXT
from uqff.system import ran_out_of_time

__all__ = ["render"]

CHILD: Final = Path(__file__).with_name("template_child.py")

PATIENCE: Final = 60.0
"""Seconds of the clock after which a renderer is killed that the system did not give its processor time."""

LONG: Final = f"at most {MAX_TEMPLATE_SECONDS} s of processor time"


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes of some variables.

    The template runs in Jinja's sandbox, in a process of its own whose processor time and memory the system bounds.

    Args:
        template: in Jinja's language, with what ``transformers`` adds to it.
        variables: by name; whatever JSON can say.

    Raises:
        FormatError: the template fails, or takes more time, memory or characters than :mod:`uqff.limits` allows.
        UnsupportedError: there is no Python interpreter to run it in.
    """
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise FormatError("chat template is too long", expected=f"at most {MAX_TEMPLATE_BYTES} bytes", got=size)
    if not sys.executable:
        raise UnsupportedError("no Python interpreter is known that could render a template")
    given = json.dumps(variables)
    most = MAX_TEMPLATE_TEXT + len(given)
    request = {
        "template": template,
        "path": [each for each in sys.path if each],
        "seconds": MAX_TEMPLATE_SECONDS,
        "memory": MAX_TEMPLATE_MEMORY + 8 * len(given),
        "longest": most,
    }
    command = [sys.executable, "-I", "-S", str(CHILD)]
    try:
        ended = subprocess.run(
            command,
            input=f'{{"variables": {given}, {json.dumps(request)[1:]}'.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FormatError("chat template takes too long", expected=LONG) from None
    if ran_out_of_time(ended.returncode):
        raise FormatError("chat template takes too long", expected=LONG)
    result = json.loads(ended.stdout) if ended.returncode == 0 else {}
    if result.get("memory"):
        raise FormatError("chat template takes too much memory", expected=f"at most {request['memory']} bytes")
    if result.get("long"):
        raise FormatError("chat template makes too long a text", expected=f"at most {most} characters")
    if "text" not in result:
        raise FormatError(
            "chat template fails", got=result.get("error", f"the renderer ended with status {ended.returncode}")
        )
    return str(result["text"])
