"""What systems differ in: whatever Windows or macOS does not have is called here, and nowhere else.

Each function says what it does where there is no such thing.  At its top this module imports what any interpreter has
imported before: :mod:`uqff.interrupts` needs it before anything else is there, and the process that renders templates
runs it as a file by itself.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    import signal as _signal
    from collections.abc import Callable
    from io import FileIO
    from pathlib import Path
    from typing import Any
else:
    import _signal  # without the enumerations of ``signal``

__all__ = [
    "FreeMap",
    "advice",
    "advise",
    "after_fork",
    "bound_template",
    "can_lock",
    "exchange",
    "has_alarms",
    "keeps_descriptors",
    "link",
    "loaded_library",
    "lock",
    "lock_of_process",
    "mapping_options",
    "on_alarm",
    "open_to_lock",
    "ran_out_of_time",
    "ring",
    "start_of_machine",
    "usable_cpus",
]

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Of Linux, ``fcntl.h`` and ``linux/fs.h``; of macOS, ``RENAME_SWAP`` of ``sys/stdio.h`` is 2, too."""


def can_lock() -> bool:
    """Whether a directory can be locked: else two runs for one place are not kept apart."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return False
    return True


def open_to_lock(path: "Path") -> int:
    """A handle of a file or directory, not of what a link leads to, and without waiting for the writer of a pipe.

    Raises:
        OSError: there is no such thing, or it may not be read; of a directory, where there are no locks.
    """
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def lock(handle: int) -> bool:
    """Lock what a handle stands for, until that is closed; False if another process has it, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def lock_of_process(handle: int) -> bool:
    """Lock a file for this process, whose forks do not inherit it; False if another one has it, True without locks.

    Raises:
        OSError: it cannot be locked.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def exchange(one: "Path", other: "Path") -> bool:
    """Exchange the names of two directories of the same file system, so that there is no moment without either.

    Returns:
        False, and nothing has been done, if the system cannot.

    Raises:
        OSError: it can, and did not.
    """
    import ctypes
    import errno

    try:
        library = ctypes.CDLL(None, use_errno=True)
        function = library.renameat2 if sys.platform == "linux" else library.renamex_np
    except (OSError, AttributeError, TypeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux":
        failed = function(AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE))
    else:
        failed = function(*names, ctypes.c_uint(RENAME_EXCHANGE))
    if not failed:
        return True
    number = ctypes.get_errno()
    # What a kernel or a file system says that has no such call; EXDEV is said across layers of overlayfs.
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def link(source: "str | Path", target: "str | Path") -> None:
    """Give a file, or a link itself, a second name; a copy, where there are no such names or not of this one."""
    import shutil

    try:
        os.link(source, target, follow_symlinks=False)
    except (AttributeError, OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def mapping_options() -> "dict[str, Any]":
    """How ``mmap.mmap`` is asked for a private mapping, which keeps no descriptor if that can be had."""
    import mmap

    options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) and os.name != "nt" else {}
    if not hasattr(mmap, "MAP_PRIVATE"):
        return options | {"access": mmap.ACCESS_COPY}
    return options | {"flags": mmap.MAP_PRIVATE | _no_reserve(), "prot": mmap.PROT_READ | mmap.PROT_WRITE}


def _no_reserve() -> int:
    """Without it a kernel may refuse to map, copy-on-write, a file that is larger than its memory."""
    import mmap

    found: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    return found


def keeps_descriptors() -> bool:
    """Whether a mapping of Python's own has a descriptor of its file, and :class:`FreeMap` would have none."""
    import mmap

    return sys.version_info < (3, 13) and hasattr(mmap, "MADV_DONTNEED")


class FreeMap:
    """A private mapping that keeps no descriptor; it is given back when its last view is gone."""

    def __init__(self, file: "FileIO", size: int) -> None:
        """The first ``size`` bytes of an open file.

        Raises:
            OSError: it cannot be mapped.
        """
        import ctypes
        import mmap
        import weakref

        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.mmap.restype = ctypes.c_void_p
        word, number = ctypes.c_size_t, ctypes.c_int
        self._library.mmap.argtypes = (ctypes.c_void_p, word, number, number, number, ctypes.c_int64)
        self._library.munmap.argtypes = (ctypes.c_void_p, word)
        self._library.madvise.argtypes = (ctypes.c_void_p, word, number)
        flags, access = mmap.MAP_PRIVATE | _no_reserve(), mmap.PROT_READ | mmap.PROT_WRITE
        self._address = self._library.mmap(None, size, access, flags, file.fileno(), 0)
        if self._address in (None, ctypes.c_void_p(-1).value):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(file.name))
        self._bytes = (ctypes.c_uint8 * size).from_address(self._address)
        # Not at exit: views may outlive it.
        weakref.finalize(self._bytes, self._library.munmap, self._address, size).atexit = False

    def view(self) -> memoryview:
        """All bytes."""
        return memoryview(self._bytes).cast("B")

    def madvise(self, value: int, start: int, length: int) -> None:
        """As of ``mmap.mmap``."""
        self._library.madvise(self._address + start, length, value)

    def close(self) -> None:
        """Leave the mapping to its last view."""
        del self._bytes


def advice(name: str) -> "int | None":
    """The number of an advice on memory, such as ``DONTNEED``; None where it cannot be given."""
    import mmap

    found: int | None = getattr(mmap, f"MADV_{name}", None)
    return found


def advise(mapping: "Any", value: int, start: int, length: int) -> None:
    """Tell the system how pages of an ``mmap.mmap`` or :class:`FreeMap` will be used: a number of :func:`advice`."""
    mapping.madvise(value, start, length)


def start_of_machine() -> bytes:
    """What processes of one machine have in common, and no others; nothing where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().strip()
    except OSError:
        return b""


def usable_cpus() -> int:
    """How many CPUs this process may use; how many there are, where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def after_fork(function: "Callable[[], None]") -> None:
    """Have a function called in each forked child; nothing where no process forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def loaded_library(path: "Path") -> "ctypes.CDLL | None":
    """A library that this process has loaded already, never a second one; None if it has not, or cannot tell."""
    import ctypes

    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None


def bound_template(seconds: float, memory: int) -> None:
    """Let this process end after ``seconds`` of processor time, and get ``memory`` more bytes of addresses at most.

    Of the two, what the system can.
    """
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm", "rb") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory,) * 2)
    except (ImportError, OSError, ValueError):
        pass
    if has_alarms():
        _signal.signal(_signal.SIGPROF, _signal.SIG_DFL)
        _signal.setitimer(_signal.ITIMER_PROF, seconds)


def ran_out_of_time(status: int) -> bool:
    """Whether a process of this status was ended by :func:`bound_template`."""
    return has_alarms() and status == -_signal.SIGPROF


def has_alarms() -> bool:
    """Whether :func:`ring` does anything."""
    return hasattr(_signal, "setitimer")


def on_alarm(handler: "Callable[..., Any] | None") -> None:
    """What :func:`ring` calls; None for nothing any more, not even what was to come. Nothing where no alarms are."""
    if has_alarms():
        if handler is None:
            _signal.setitimer(_signal.ITIMER_REAL, 0)
        _signal.signal(_signal.SIGALRM, _signal.SIG_DFL if handler is None else handler)


def ring(seconds: float) -> None:
    """Let the alarm go off after so many seconds, in the main thread; nothing where no alarms are."""
    if has_alarms():
        _signal.setitimer(_signal.ITIMER_REAL, seconds)
