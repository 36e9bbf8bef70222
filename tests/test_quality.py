"""``make quality``, of which hours pass before it shows what is wrong with it."""

from __future__ import annotations

import pickle
import subprocess
import sys

from tests.support.tiny_files import ROOT


def test_processes_that_are_begun_anew_find_what_they_are_to_do() -> None:
    """They have nothing of the module that ``python -m`` runs: a function of it would end the first of them."""
    script = "import runpy; f = runpy.run_module('tools.quality.__main__', run_name='another')['row_of']"
    script += "; import pickle, sys; sys.stdout.buffer.write(pickle.dumps(f))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, check=True)
    assert pickle.loads(done.stdout).__module__ == "tools.quality.row"
