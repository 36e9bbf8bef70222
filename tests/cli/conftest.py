"""The files of these tests are those of ``tests/inspection``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "inspection"))
