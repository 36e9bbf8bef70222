"""Progress on the terminal that errors go to, nothing where there is no terminal; and an end that cleans up."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from uqff.errors import printable

if TYPE_CHECKING:
    from uqff.container.directory import Progress, Step

__all__ = ["byte_progress", "clear_line", "show_share", "step_progress", "terminable", "told_of_compiling"]

COMPILING = "compiling kernels for this CPU, once"

TERMINATED = 128 + 15
"""What a shell reports for a process that ended by SIGTERM."""


def show_share(done: int, total: int, text: str) -> None:
    """Overwrite the line: a percentage, and what there is to say."""
    if sys.stderr.isatty():
        click.echo(f"\r{100 * done // (total or 1):3d} %  {text}\x1b[K", err=True, nl=False)


def clear_line() -> None:
    """Take the line away."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


@contextlib.contextmanager
def told_of_compiling(tell: Callable[[], object] | None = None) -> Iterator[None]:
    """Have it said when a kernel is compiled: by a line that :func:`clear_line` takes away, or by ``tell``."""

    class Handler(logging.Handler):
        def emit(self, _: logging.LogRecord) -> None:
            if tell is not None:
                tell()
            elif sys.stderr.isatty():
                click.echo(f"\r{COMPILING}\x1b[K", err=True, nl=False)

    logger, handler = logging.getLogger("uqff.compiling"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        if tell is None:
            clear_line()


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many bytes are done of how many; the line vanishes when the block ends."""
    try:
        yield lambda done, total: show_share(done, total, f"of {total:,} bytes {what}")
    finally:
        clear_line()


@contextlib.contextmanager
def step_progress(*, shown: bool) -> Iterator[Progress | None]:
    """A bar with layer, rate and time left, which says when kernels are compiled; none if it is not to be shown."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[layer]}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}  {task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, layer="", count="", rate="")

        def step(step: Step) -> None:
            speed = bar.tasks[0].speed
            bar.update(
                task,
                total=step.weights,
                completed=step.weights_done,
                layer=printable(step.module),
                count=f"{step.layers_done}/{step.layers}",
                rate="" if not speed else f"{speed / 1e6:.0f} M weights/s",
            )

        with told_of_compiling(lambda: bar.update(task, layer=COMPILING)):
            yield step


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let a termination clean up like an interrupt, where signals can be caught."""

    def stop(*_: object) -> None:
        sys.exit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
