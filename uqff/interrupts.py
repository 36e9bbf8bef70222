"""What Ctrl-C does to a command: it ends with the shell's code for that, without a word, whatever is going on.

There are two states.  Until a command runs, and after it has run, nothing is to be put in order: the process ends at
once.  While it runs, there are temporary files to be removed, so :class:`KeyboardInterrupt` is raised, but not where it
would be lost or become another error: within an import (C code turns it into an ``ImportError``), a ``__del__``, or a
callback, of which Python would only print it.  There it waits for the end of that, but not the seconds, on a machine
with other work half a minute, of an ``import torch``: then, or at a second Ctrl-C, the process ends at once, and the
next run removes what this one has left.

While the libraries of torch are loaded, Python does not get to look at what has come, and from a disk that is busy they
may take seconds: there the signal itself ends the process, of which a shell reports the same code.

This module imports nothing that the interpreter has not imported before its first line, but ``uqff.system``, which is
like it: what is interrupted earlier ends with Python's own traceback.
"""

import os
import sys
import time

from uqff import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import FrameType
    from typing import Any
else:
    import _signal  # without the enumerations of ``signal``, which take longer to import than all that is here

__all__ = ["INTERRUPTED", "Raised", "end_at_once"]

INTERRUPTED = 128 + 2
"""What a shell reports for a process that ended by SIGINT."""

AGAIN = 0.02
"""Seconds after which it is tried again to raise what would have been lost."""

LONGEST = 1.0
"""Seconds after which the process ends if it could not be raised."""

SLOW = {"torch._C"}
"""Names of modules in C whose libraries take seconds to load."""

IMPORTING = "<frozen importlib._bootstrap>"
"""File of the frames in which an import is under way."""


EXTENSIONS: "Any" = sys.modules["_frozen_importlib_external"].ExtensionFileLoader
"""What loads modules in C."""


def end_at_once() -> None:
    """From here on, Ctrl-C ends the process; not if it does nothing, as in what a shell runs in the background."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _end)


def _end(number: int, frame: "FrameType | None") -> None:
    os._exit(INTERRUPTED)


class Raised:
    """A block in which Ctrl-C is a :class:`KeyboardInterrupt`, if it was to end the process before.

    Attributes:
        waits: whether one has been waiting for a while to be raised.
        until: when the process ends if one that waits could not be raised; 0 if none waits.
    """

    waits = False
    until = 0.0

    def __enter__(self) -> None:
        self._is_ours = _signal.getsignal(_signal.SIGINT) is _end
        if self._is_ours:
            self._hook, sys.unraisablehook = sys.unraisablehook, _unraisable
            system.on_alarm(_raise)
            _signal.signal(_signal.SIGINT, _raise)
            self._load, EXTENSIONS.create_module = EXTENSIONS.create_module, _slow_ones_end(EXTENSIONS.create_module)

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            EXTENSIONS.create_module = self._load
            _signal.signal(_signal.SIGINT, _end)
            system.on_alarm(None)  # one that waits has come too late: the command is done
            sys.unraisablehook = self._hook


def _raise(number: int, frame: "FrameType | None") -> None:
    each = frame
    while each is not None and system.has_alarms():
        if each.f_code.co_filename == IMPORTING or each.f_code.co_name == "__del__":
            now = time.monotonic()
            Raised.until = Raised.until or now + LONGEST
            if now >= Raised.until or (number == _signal.SIGINT and Raised.waits):
                os._exit(INTERRUPTED)
            Raised.waits = number != _signal.SIGINT  # not of two that come at once, as from a group and its leader
            system.ring(AGAIN)
            return
        each = each.f_back
    Raised.waits, Raised.until = False, 0.0
    raise KeyboardInterrupt


def _slow_ones_end(load: "Callable[..., Any]") -> "Callable[..., Any]":
    """What loads modules in C, so that SIGINT ends the process meanwhile if they are of the slow ones."""

    def create_module(self: object, spec: "ModuleSpec") -> "Any":
        if spec.name not in SLOW:
            return load(self, spec)
        if Raised.until:
            os._exit(INTERRUPTED)
        try:
            before = _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        except ValueError:  # not in the main thread
            return load(self, spec)
        try:
            return load(self, spec)
        finally:
            _signal.signal(_signal.SIGINT, before)

    return create_module


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt) and system.has_alarms():
        system.ring(AGAIN)
    else:
        sys.__unraisablehook__(lost)
