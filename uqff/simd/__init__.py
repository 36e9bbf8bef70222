"""What fast twins of the reference paths are written in on the CPU, and whether they are used.

Kernels need numba and are bit-equal to the reference (NaN payloads aside).  ``UQFF_KERNELS=reference`` turns them off;
without numba the reference serves, with one warning.  numba is imported when a kernel is first needed.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

__all__ = ["choice", "enabled"]

ENVIRONMENT_VARIABLE = "UQFF_KERNELS"

_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)
_ALWAYS = (_KEY,)


def enabled() -> bool:
    """Whether kernels are used: numba can be imported and compiles, and ``UQFF_KERNELS`` does not say ``reference``.

    Raises:
        ValueError: ``UQFF_KERNELS`` is neither empty, ``numba`` nor ``reference``.
    """
    return choice() != "reference" and _compiles()


def choice() -> str:
    """What ``UQFF_KERNELS`` says: nothing, ``numba`` or ``reference``.

    Raises:
        ValueError: something else.
    """
    # Every product asks. The environment encodes a name and fails to find it, which takes a microsecond; its own
    # dictionary, where it has one by that name, takes a tenth.
    if _KEY not in getattr(os.environ, "_data", _ALWAYS):
        return ""
    said = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if said not in ("", "numba", "reference"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected 'numba' or 'reference', got {said!r}")
    return said


@lru_cache
def _compiles() -> bool:
    try:
        import numba
    except ImportError as error:
        warnings.warn(f"numba cannot be imported ({error}): the slow reference paths serve", stacklevel=4)
        return False
    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
