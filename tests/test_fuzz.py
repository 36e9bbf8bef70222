"""A short run of ``make fuzz``: hostile inputs of every target, within bounded time and memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

from tools.fuzz.mutators import KINDS, mutated


def test_no_input_escapes(tmp_path: Path) -> None:
    """The seeds, good and bad, and some changed ones of each target; millions of them: ``make fuzz``."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.fuzz", "--inputs", "10", "--seed", "0"]
    own = {"PYTHONPATH": os.getcwd(), "UQFF_FUZZ": str(tmp_path), "UQFF_KERNELS": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"^([0-9]+) inputs, 0 problems$", done.stdout, re.M)
    assert match is not None
    assert int(match[1]) > 1000
    assert len(re.findall(r"^(?:blobs|framing|containers|residual|GGUF|config|report|recipes)", done.stdout, re.M)) == 9
    assert not (tmp_path / "found").exists()


def test_changes_are_those_of_their_seed() -> None:
    """A run can be had again; each kind changes what it is given, and gives bytes whatever it is given."""
    for kind in KINDS:
        for data in (b"", b"x", b'{"a": [1, {"b": null}]}', (8).to_bytes(8, "little") + b'{"a":{}}', bytes(300)):
            made = [mutated(data, kind, Random(seed), [data]) for seed in range(40)]
            assert made == [mutated(data, kind, Random(seed), [data]) for seed in range(40)]
            assert len(set(made)) > 1 or not data
