"""How the kernels are compiled, and what keeps a compiled kernel from outliving its source.

numba keeps compiled code on disk and takes it again if the file that defines the function has the same size and time.
It does not see a change of what that function calls or takes from other files; and installers may give every version's
files one time.  So the kernels carry a stamp of their own: a digest of all sources that are compiled into them.

numba keeps it where ``NUMBA_CACHE_DIR`` says; else in ``__pycache__`` beside each source; else, where that cannot be
written, in the user's cache directory (``~/.cache/numba`` on Linux).  If there is no such place, or the disk is full,
every process compiles for itself.  Processes that need the same kernel at once, as ranks do, wait for the one that
compiles it.

Compiling takes seconds, so :data:`LOGGER` says at level INFO which kernel is being compiled; it is silent when one is
read from the cache.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from uuid import uuid4

import numba
from numba import extending
from numba.core import lowering
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.typed_passes import NativeLowering

from uqff.system import can_lock, lock_of_process

__all__ = ["LOGGER", "SOURCES", "inline", "kernel", "overload", "stamp", "subroutine"]

LOGGER: Final = logging.getLogger("uqff.compiling")

_Function = TypeVar("_Function", bound=Callable[..., Any])

PACKAGE: Final = Path(__file__).parent.parent

SOURCES: Final = ("simd", "numerics", "families", "schema", "lora")
"""Packages whose code and numbers are compiled into kernels."""


def kernel(function: _Function) -> _Function:
    """Compile what Python calls, at its first call: without the GIL, with C's division, kept on disk.

    Without ``fastmath`` the compiler neither reorders float operations nor fuses a product into a sum.
    """
    compiled = _compiled(function)
    kept: Any = getattr(compiled, "_cache", None)
    file: Any = getattr(kept, "_cache_file", None)
    if stamp() and hasattr(file, "_source_stamp") and hasattr(file, "_data_name"):
        file._source_stamp = stamp()
        file._data_name = lambda _: _own_name(file)
        kept.save_overload = _kept_if_possible(kept.save_overload, file)
        if isinstance(compiled, CPUDispatcher):
            alone = compiled.alone = _Alone(str(Path(file._cache_path, f"{file._index_name}.lock")))  # type: ignore[attr-defined]
            kept.load_overload = _loaded_or_alone(kept.load_overload, alone)
            compiled.__class__ = _Dispatcher
    elif hasattr(kept, "disable"):
        # Another numba than those we know, or sources that cannot be read: slow to start rather than stale.
        kept.disable()
    return cast(_Function, compiled)


def _kept_if_possible(save: Callable[[Any, Any], None], file: Any) -> Callable[[Any, Any], None]:
    """A disk that has filled up, or become read-only, costs another compilation, not the result.

    Code of other sources goes when the first of these is kept.
    """

    def save_if_possible(signature: Any, compiled: Any) -> None:
        with contextlib.suppress(OSError):
            stale = [] if file._load_index() else list(Path(file._cache_path).glob(escape(_stem(file)) + ".*.nbc"))
            for path in stale:
                path.unlink(missing_ok=True)
            save(signature, compiled)

    return save_if_possible


class _Alone:
    """A lock between processes. Where there is none to be had, everybody has it.

    A lock of POSIX: it ends with its process, and forks do not inherit it.
    """

    patience: float = 60.0
    """Seconds after which a process compiles beside another one: much longer than a kernel takes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = -1

    def take(self) -> None:
        """Wait for it."""
        if not can_lock() or self._file >= 0:
            return
        end = time.monotonic() + self.patience
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            while not lock_of_process(self._file) and time.monotonic() <= end:
                time.sleep(0.02)

    def give(self) -> None:
        """Let the next one have it. Two threads may give it back: closed twice, it may be another's file by then."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _loaded_or_alone(load: Callable[[Any, Any], Any], alone: _Alone) -> Callable[[Any, Any], Any]:
    """Where a kernel is not there: no other process compiles it from now on, and what one has compiled is taken."""

    def load_or_be_alone(signature: Any, context: Any) -> Any:
        if (found := load(signature, context)) is not None:
            return found
        alone.take()
        return load(signature, context)

    return load_or_be_alone


def _own_name(file: Any) -> str:
    """A file name for the code of one signature, of no other signature or process.

    numba counts: two processes that begin without a cache would both take 1, and the index of the one that is written
    last could name the code of the other, for other types of arguments.
    """
    return f"{_stem(file)}.{uuid4().hex}.nbc"


def _stem(file: Any) -> str:
    return str(file._index_name).removesuffix(".nbi")


def _compiled(function: Callable[..., Any]) -> Any:
    # What C would call is a tenth of what there is to compile, and nothing in C calls a kernel.
    options: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True, "pipeline_class": _KernelCompiler}
    try:
        return _jit(function, cache=True, **options)
    except RuntimeError:  # no place where a cache could be written
        return _jit(function, **options)


_OPTIONS: Final[dict[str, Any]] = {"error_model": "numpy", "fastmath": False}


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    return numba.njit(**_OPTIONS, **options)(function)


@cache
def _widest_vectors_pay() -> bool:
    """Whether this CPU has AVX-512 and keeps its clock when it is used: Ice Lake, Zen 4 and later.

    LLVM vectorises loops for half of its registers there, as it must for their forerunners.
    """
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return {"+avx512f", "+avx512bw", "+avx512vl", "+avx512vbmi2"} <= set(features)


class _Lower(lowering.Lower):
    def setup_function(self, fndesc: Any) -> None:
        super().setup_function(fndesc)  # type: ignore[no-untyped-call]
        if _widest_vectors_pay():
            # llvmlite's own ``add`` knows attributes without a value only.
            set.add(self.function.attributes, '"prefer-vector-width"="512"')


@register_pass(mutates_CFG=True, analysis_only=False)  # type: ignore[no-untyped-call]
class _KernelLowering(NativeLowering):
    _name = "lowering_of_kernels"

    @property
    def lowering_class(self) -> type[lowering.Lower]:
        return _Lower


@register_pass(mutates_CFG=True, analysis_only=False)  # type: ignore[no-untyped-call]
class _PartLowering(_KernelLowering):
    """For what only becomes part of kernels: no machine code, which takes a third of the time of a kernel."""

    _name = "lowering_of_parts"

    def run_pass(self, state: Any) -> bool:
        context = state.targetctx
        state.library = _PartLibrary(context.codegen(), state.func_id.func_qualname)  # type: ignore[no-untyped-call]
        state.flags.no_compile = True
        super().run_pass(state)  # type: ignore[no-untyped-call]
        # A key by which callers find it; the dispatcher takes nothing but built-in functions.
        key = object().__reduce__
        context.insert_user_function(key, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=key)
        return True


class _PartLibrary(JITCodeLibrary):
    """IR that is linked into other libraries, and optimised there."""

    def _optimize_final_module(self) -> None:
        """Simplify only. Left as they are, parts look too large to LLVM's own inlining and loops of kernels."""
        options = {"loop_vectorize": False, "slp_vectorize": False, "opt": 0, "cost": "cheap"}
        made = self._codegen._module_pass_manager(**options)  # type: ignore[no-untyped-call]
        passes, *builder = made if isinstance(made, tuple) else [made]  # before 0.62 numba had LLVM's former passes
        passes.run(self._final_module, *builder)

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()  # type: ignore[no-untyped-call]
        self._finalized = True


class _KernelCompiler(CompilerBase):
    """numba's own pipeline, but for the lowering."""

    lowering: type[_KernelLowering] = _KernelLowering

    def define_pipelines(self) -> list[Any]:
        if self.lowering is _KernelLowering:
            LOGGER.info("compiling %s for this CPU, once", self.state.func_id.func_qualname)
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)  # type: ignore[no-untyped-call]
        passes.passes = [(self.lowering if each is NativeLowering else each, why) for each, why in passes.passes]
        passes.finalize()
        return [passes]


class _PartCompiler(_KernelCompiler):
    lowering = _PartLowering


_PART_OPTIONS: Final = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}


def inline(function: _Function) -> _Function:
    """Compile what kernels call, into each of them, so that sizes are constants there. Python cannot call it."""
    return _part(function, forceinline=True)


def subroutine(function: _Function) -> _Function:
    """Compile what kernels call; LLVM decides whether it becomes part of them. Python cannot call it."""
    return _part(function)


def _part(function: _Function, **options: Any) -> _Function:
    compiled = _jit(function, **_PART_OPTIONS, **options)
    if isinstance(compiled, CPUDispatcher):
        compiled.__class__ = _Part
    return cast(_Function, compiled)


def overload(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give what kernels call by the name of a function its meaning for some types, as numba's ``overload`` does.

    What it decorates returns, given the types of the arguments, the function to compile like :func:`inline`, or None.
    """
    options: Any = {**_OPTIONS, **_PART_OPTIONS, "forceinline": True}
    decorate: Any = extending.overload(function, jit_options=options)
    return cast("Callable[[Callable[..., Any]], Callable[..., Any]]", decorate)


class _Uncollected:
    """Python does not look for garbage inside: of what numba makes of a kernel nearly all is still in use, and an
    eighth of the time went into finding that out.

    Threads may be inside at once: collecting goes on when the last has left, if it was on when the first came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_on:
                gc.enable()


_UNCOLLECTED: Final = _Uncollected()


class _Dispatcher(CPUDispatcher):
    """What is alone while it is compiled."""

    alone: _Alone = _Alone("")  # of one that numba has made from a pickle

    def compile(self, sig: Any) -> Any:
        """Until it is kept, or fails."""
        try:
            with _UNCOLLECTED:
                return super().compile(sig)
        finally:
            self.alone.give()


class _Part(CPUDispatcher):
    """What has no machine code of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: under the pickle of its closure numba keeps a kernel that is made for a part."""
        return _named, (self.py_func.__module__, self.py_func.__qualname__)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is for kernels; Python cannot call it")


def _named(module: str, name: str) -> Any:
    return getattr(sys.modules[module], name)


@cache
def stamp() -> str:
    """A digest of the sources of :data:`SOURCES`; empty if they cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in sorted(path for package in SOURCES for path in (PACKAGE / package).rglob("*.py")):
            source = path.read_bytes()
            digest.update(b"%s %d\n" % (path.relative_to(PACKAGE).as_posix().encode(), len(source)))
            digest.update(source)
    except OSError:
        return ""
    return digest.hexdigest()
