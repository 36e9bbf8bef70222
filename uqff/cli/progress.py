"""Progress on the terminal that errors go to, nothing where there is no terminal; and an end that cleans up."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator

import click

from uqff.errors import printable
from uqff.progress import Step

__all__ = ["COMPILING", "Display", "shown_progress", "terminable", "told_of_compiling"]

COMPILING = "compiling kernels for this CPU, once"

TERMINATED = 128 + 15
"""What a shell reports for a process that ended by SIGTERM."""


class Display:
    """A bar with what was done last, how many are done, rate and time left; shown from the first word on."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.fields[key]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}  {task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("", total=None, key="", count="", rate="")

    def __call__(self, step: Step) -> None:
        """Show a step."""
        speed = self._bar.tasks[0].speed
        self._bar.update(
            self._task,
            total=step.work,
            completed=step.work_done,
            key=printable(step.key),
            count=f"{step.done}/{step.total}",
            rate="" if not speed else f"{speed / 1e6:.0f} M {step.unit}/s",
        )
        self._bar.start()

    def tell(self, text: str) -> None:
        """Show a text in place of what was done last."""
        self._bar.update(self._task, key=text)
        self._bar.start()

    def hide(self) -> None:
        """Take the bar away until there is more to show."""
        self._bar.stop()


@contextlib.contextmanager
def shown_progress(*, shown: bool = True) -> Iterator[Display | None]:
    """What shows the steps of an operation, and when kernels are compiled; None where there is no terminal, or if
    neither is to be shown.
    """
    if not shown or not sys.stderr.isatty():
        yield None
        return
    display = Display()
    try:
        with told_of_compiling(lambda: display.tell(COMPILING)):
            yield display
    finally:
        display.hide()


@contextlib.contextmanager
def told_of_compiling(tell: Callable[[], object] | None = None) -> Iterator[None]:
    """Have it said when a kernel is compiled: by ``tell``, or by a line that vanishes when the block ends."""

    def line(text: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{text}\x1b[K", err=True, nl=False)

    class Handler(logging.Handler):
        def emit(self, _: logging.LogRecord) -> None:
            if tell is None:
                line(COMPILING)
            else:
                tell()

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
            line("")


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
