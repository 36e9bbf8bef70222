"""Texts of the repository that a tool makes: written, or compared with what is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["settle"]

ROOT = Path(__file__).resolve().parents[1]


def settle(wanted: Iterable[tuple[Path, str]], *, check: bool) -> int:
    """Write each text that is not there as it should be, or only say so.

    Args:
        wanted: files of the repository, and what shall be in them.
        check: write nothing.

    Returns:
        The exit code: 1 if something differs and was not written.
    """
    stale = [(path, text) for path, text in wanted if not path.exists() or path.read_text("utf-8") != text]
    for path, text in stale:
        print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, "utf-8")
    return 1 if check and stale else 0
