"""A line of progress on the terminal that errors go to; nothing where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click

__all__ = ["byte_progress", "clear_line", "show_share"]


def show_share(done: int, total: int, text: str) -> None:
    """Overwrite the line: a percentage, and what there is to say."""
    if sys.stderr.isatty():
        click.echo(f"\r{100 * done // (total or 1):3d} %  {text}\x1b[K", err=True, nl=False)


def clear_line() -> None:
    """Take the line away."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many bytes are done of how many; the line vanishes when the block ends."""
    try:
        yield lambda done, total: show_share(done, total, f"of {total:,} bytes {what}")
    finally:
        clear_line()
