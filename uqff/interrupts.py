"""What Ctrl-C does to a command: it ends with the shell's code for that, without a word, whatever is going on.

There are two states.  Until a command runs, and after it has run, nothing is to be put in order: the process ends at
once.  While it runs, there are temporary files to be removed, so :class:`KeyboardInterrupt` is raised, but not where it
would be lost or become another error: within an import (C code turns it into an ``ImportError``), a ``__del__``, or a
callback, of which Python would only print it.  There it waits for the end of that, which may take the seconds of an
``import torch``; a second Ctrl-C then ends the process at once, and the next run removes what this one has left.

This module imports nothing that the interpreter has not imported before its first line: what is interrupted earlier
ends with Python's own traceback.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from types import FrameType
else:
    import _signal  # without the enumerations of ``signal``, which take longer to import than all that is here

__all__ = ["INTERRUPTED", "Raised", "end_at_once"]

INTERRUPTED = 128 + 2
"""What a shell reports for a process that ended by SIGINT."""

AGAIN = 0.02
"""Seconds after which it is tried again to raise what would have been lost."""

IMPORTING = "<frozen importlib._bootstrap>"
"""File of the frames in which an import is under way."""


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
    """

    waits = False

    def __enter__(self) -> None:
        self._is_ours = _signal.getsignal(_signal.SIGINT) is _end
        if self._is_ours:
            self._hook, sys.unraisablehook = sys.unraisablehook, _unraisable
            if hasattr(_signal, "setitimer"):
                _signal.signal(_signal.SIGALRM, _raise)
            _signal.signal(_signal.SIGINT, _raise)

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            _signal.signal(_signal.SIGINT, _end)
            if hasattr(_signal, "setitimer"):  # one that waits has come too late: the command is done
                _signal.setitimer(_signal.ITIMER_REAL, 0)
                _signal.signal(_signal.SIGALRM, _signal.SIG_DFL)
            sys.unraisablehook = self._hook


def _raise(number: int, frame: "FrameType | None") -> None:
    each = frame
    while each is not None and hasattr(_signal, "setitimer"):
        if each.f_code.co_filename == IMPORTING or each.f_code.co_name == "__del__":
            if number == _signal.SIGINT and Raised.waits:
                os._exit(INTERRUPTED)
            Raised.waits = number != _signal.SIGINT  # not of two that come at once, as from a group and its leader
            _signal.setitimer(_signal.ITIMER_REAL, AGAIN)
            return
        each = each.f_back
    Raised.waits = False
    raise KeyboardInterrupt


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt) and hasattr(_signal, "setitimer"):
        _signal.setitimer(_signal.ITIMER_REAL, AGAIN)
    else:
        sys.__unraisablehook__(lost)
