"""Exit 1 if a Python file of the project is over 500 lines: it is asking to become two modules.

python -m tools.lengths     # make lint
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 500


def too_long(root: Path, most: int = MOST) -> dict[str, int]:
    """Lines of each file below ``uqff``, ``tools`` and ``tests`` that has more than `most`, by path."""
    lines = {
        path.relative_to(root).as_posix(): len(path.read_text("utf-8").splitlines())
        for folder in ("uqff", "tools", "tests")
        for path in sorted((root / folder).rglob("*.py"))
    }
    return {path: count for path, count in lines.items() if count > most}


def main() -> int:
    """Name the files that are too long."""
    found = too_long(ROOT)
    for path, count in found.items():
        print(f"{path}: {count} lines, at most {MOST}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
