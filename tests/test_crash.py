"""A short run of ``make crash``: writers killed before some of their calls, and on full disks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler: make crash"
)


def test_old_or_new_after_every_kill() -> None:
    """Nothing between, nothing lost, nothing left behind; all of them: ``make crash``."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.crash", "--only", "save, set over set", "--one-in", "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"^([0-9]+) kills, ([0-9]+) full disks, 0 problems$", done.stdout, re.M)
    assert match is not None
    assert int(match[1]) > 8
