#!/usr/bin/env python3
"""``uqff inspect`` from a checkout that is not installed: ``python tools/inspect_uqff.py PATH [KEY] [options]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from uqff.cli import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]], prog_name="inspect_uqff.py")
