"""How the kernels are compiled, and what keeps a compiled kernel from outliving its source.

numba keeps compiled code on disk and takes it again if the file that defines the function has the same size and time.
It does not see a change of what that function calls or takes from other files; and installers may give every version's
files one time.  So the kernels carry a stamp of their own: a digest of all sources that are compiled into them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba
from numba.core import lowering
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.typed_passes import NativeLowering

__all__ = ["SOURCES", "inline", "kernel", "stamp", "subroutine"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

PACKAGE: Final = Path(__file__).parent.parent

SOURCES: Final = ("simd", "numerics", "families")
"""Packages whose code and numbers are compiled into kernels."""


def kernel(function: _Function) -> _Function:
    """Compile what Python calls, at its first call: without the GIL, with C's division, kept on disk.

    Without ``fastmath`` the compiler neither reorders float operations nor fuses a product into a sum.
    """
    compiled = _compiled(function)
    kept: Any = getattr(compiled, "_cache", None)
    file: Any = getattr(kept, "_cache_file", None)
    if stamp() and hasattr(file, "_source_stamp"):
        file._source_stamp = stamp()
    elif hasattr(kept, "disable"):
        # Another numba than those we know, or sources that cannot be read: slow to start rather than stale.
        kept.disable()
    return cast(_Function, compiled)


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return _jit(function, nogil=True, cache=True)
    except RuntimeError:  # no place where a cache could be written
        return _jit(function, nogil=True)


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    if _widest_vectors_pay():
        options["pipeline_class"] = _WidestVectors
    return numba.njit(error_model="numpy", fastmath=False, **options)(function)


@cache
def _widest_vectors_pay() -> bool:
    """Whether this CPU has AVX-512 and keeps its clock when it is used: Ice Lake, Zen 4 and later.

    LLVM vectorises loops for half of its registers there, as it must for their forerunners.
    """
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return {"+avx512f", "+avx512bw", "+avx512vl", "+avx512vbmi2"} <= set(features)


class _WidestVectors(CompilerBase):
    """numba's own pipeline, but for what :class:`_Lowering` adds to the function."""

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)  # type: ignore[no-untyped-call]
        passes.passes = [(_Lowering if each is NativeLowering else each, why) for each, why in passes.passes]
        passes.finalize()
        return [passes]


@register_pass(mutates_CFG=True, analysis_only=False)  # type: ignore[no-untyped-call]
class _Lowering(NativeLowering):
    _name = "lowering_for_the_widest_vectors"

    @property
    def lowering_class(self) -> type[lowering.Lower]:
        return _Lower


class _Lower(lowering.Lower):
    def setup_function(self, fndesc: Any) -> None:
        super().setup_function(fndesc)  # type: ignore[no-untyped-call]
        # llvmlite's own ``add`` knows attributes without a value only.
        set.add(self.function.attributes, '"prefer-vector-width"="512"')


def inline(function: _Function) -> _Function:
    """Compile what kernels call, into each of them, so that sizes are constants there.

    Python cannot call it: what would unpack its arguments there takes a fifth of the time to compile a kernel.
    """
    compiled = _jit(function, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    if isinstance(compiled, CPUDispatcher):
        compiled.__class__ = _Inlined
    return cast(_Function, compiled)


class _Inlined(CPUDispatcher):
    """What would otherwise jump to where no code is."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is for kernels; Python cannot call it")


def subroutine(function: _Function) -> _Function:
    """Compile what kernels call rarely: LLVM decides whether it becomes part of them."""
    return cast(_Function, _jit(function))


@cache
def stamp() -> str:
    """A digest of the sources of :data:`SOURCES`; empty if they cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in sorted(path for room in SOURCES for path in (PACKAGE / room).rglob("*.py")):
            source = path.read_bytes()
            digest.update(b"%s %d\n" % (path.relative_to(PACKAGE).as_posix().encode(), len(source)))
            digest.update(source)
    except OSError:
        return ""
    return digest.hexdigest()
