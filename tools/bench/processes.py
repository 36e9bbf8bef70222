"""A process measured as a whole: wall and CPU seconds, and the memory that it alone had.

A process begins with its parent's pages, and the system's count of the most it ever had begins with them too.  So
every command is started by a launcher of a few MiB, itself a fresh interpreter without site packages: what is counted
is the command's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Usage", "run"]

_LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
child = os.fork()
if child == 0:
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    finally:
        os._exit(127)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - start
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
"""


class Usage(NamedTuple):
    """What a process took.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of all its threads, in the system too.
        peak_mib: the most resident memory it had, mapped files included.
        output: what it printed, both streams.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: str


def run(command: Sequence[str]) -> Usage:
    """Run a command, whose first word is a path.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    with tempfile.NamedTemporaryFile() as found, tempfile.TemporaryFile() as printed:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, found.name, *command]
        subprocess.run(launcher, check=True, stdout=printed, stderr=subprocess.STDOUT)
        code, seconds, cpu_seconds, peak = json.loads(Path(found.name).read_text("utf-8"))
        printed.seek(0)
        output = printed.read().decode("utf-8", "replace")
    if code:
        raise RuntimeError(f"exit code {code}: {' '.join(command)}\n{output}")
    return Usage(seconds, cpu_seconds, peak / (2**20 if sys.platform == "darwin" else 2**10), output)
