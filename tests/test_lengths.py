"""tools.lengths: which files are too long."""

from __future__ import annotations

from pathlib import Path

from tools.lengths import too_long


def test_a_file_over_the_bound_is_named(tmp_path: Path) -> None:
    """At the bound is not over it; only Python, only the three folders."""
    for path, lines in (("uqff/a/long.py", 4), ("tools/just.py", 3), ("tests/data.txt", 9), ("docs/b.py", 9)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x\n" * lines)
    assert too_long(tmp_path, 3) == {"uqff/a/long.py": 4}
