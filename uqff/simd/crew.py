"""Threads that wait for work inside of compiled code, for products that take as long as it takes to wake one.

A token has hundreds of products, a fraction of a millisecond each. What :mod:`uqff.simd.threads` needs for each of
them, and for each range of each (locks, futures, the GIL), is a good part of that. Here a product is one call: its
arguments lie in memory that all threads know, each takes ranges by an atomic counter, and none needs Python for it.

::

    memory    state     open: there are ranges to take; how many threads may take part; how many do
              next      the number of the next range
              job       where the stage is
    stage     words, most helpers, ranges; of each part: its frame, items, items a range, ranges up to its end
    frame     the function of a part, and its arguments

A stage has one part, or some that do not depend on each other, whose ranges are taken alike. Stages that follow each
other can be made once and done by one call: :mod:`uqff.simd.chain`.

Threads look for work for some :data:`PATIENCE` after the last, then they sleep, and cost nothing.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import atexit
import platform
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from uqff.simd.compiling import inline, kernel, subroutine
from uqff.simd.threads import num_threads
from uqff.simd.vectors import intrinsic, signature
from uqff.system import after_fork

__all__ = ["FRAME", "PATIENCE", "RANGES", "Shared", "address_of", "run_stages"]

PATIENCE: Final = 200e-6
"""Seconds that a thread looks for work, and its caller for the end of it: it takes as long to fall asleep and wake."""

RANGES: Final = 8
"""Ranges a thread, so that one that the system took away for a while does not hold up the others."""

_LINE: Final = 8
"""Numbers in a cache line: what threads write has one for itself."""
STATE, NEXT, JOB, STAGE = 0, 2 * _LINE, 4 * _LINE, 5 * _LINE
SIZE: Final = 7 * _LINE
"""Of the memory, which ends with a stage of one part."""
WORDS, HELPERS, COUNT, PARTS = 0, 1, 2, 3
PLACE, ITEMS, STEP, LAST, PART = 0, 1, 2, 3, 4
FRAME: Final = 32 * _LINE
"""Numbers that a frame has at most."""

OPEN: Final = 1 << 40
MANY: Final = 1 << 20
"""``state`` is ``OPEN``, or 0, plus ``MANY`` times the most helpers, plus those that take part."""

Memory = npt.NDArray[np.int64]


def _address(context: Any, builder: Any, memory: Any, types_: Any, at: Any) -> Any:
    array = context.make_array(types_)(context, builder, memory)
    return builder.gep(array.data, [at])


@intrinsic
def _load(_typing: Any, memory: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_address(context, builder, args[0], sig.args[0], args[1]), "seq_cst", 8)

    return signature(types.int64, memory, types.intp), generate


@intrinsic
def _store(_typing: Any, memory: Any, at: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _address(context, builder, args[0], sig.args[0], args[1]), "seq_cst", 8)
        return context.get_dummy_value()

    return signature(types.none, memory, types.intp, types.int64), generate


def _changed(operation: str) -> Any:
    @intrinsic
    def change(_typing: Any, memory: Any, at: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = _address(context, builder, args[0], sig.args[0], args[1])
            return builder.atomic_rmw(operation, address, args[2], "seq_cst")

        return signature(types.int64, memory, types.intp, types.int64), generate

    return change


_add, _and = _changed("add"), _changed("and")


@intrinsic
def _swap(_typing: Any, memory: Any, at: Any, known: Any, value: Any) -> Any:
    """Whether it was what is known, and now is the value."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, args[0], sig.args[0], args[1])
        return builder.extract_value(builder.cmpxchg(address, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return signature(types.boolean, memory, types.intp, types.int64, types.int64), generate


@intrinsic
def _pause(_typing: Any) -> Any:
    """Tell the CPU that this thread waits."""

    def generate(context: Any, builder: Any, _sig: Any, _args: Any) -> Any:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), function), [])
        elif machine in ("aarch64", "arm64"):
            function = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = builder.module.declare_intrinsic("llvm.aarch64.hint", (), function)
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return signature(types.none), generate


@intrinsic
def address_of(_typing: Any, memory: Any, at: Any) -> Any:
    """Where a number of an array is."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _address(context, builder, args[0], sig.args[0], args[1])
        return builder.ptrtoint(place, ir.IntType(64))

    return signature(types.int64, memory, types.intp), generate


@intrinsic
def _word(_typing: Any, place: Any, at: Any) -> Any:
    """A number behind an address."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        array = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(array, [args[1]]))

    return signature(types.int64, types.int64, types.intp), generate


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """A value without what counts who holds its arrays: that ends when Python's call does."""
    if isinstance(kind, types.BaseTuple):
        members: Any = kind
        parts = [_borrowed(context, builder, each, builder.extract_value(value, i)) for i, each in enumerate(members)]
        return context.make_tuple(builder, kind, parts)
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = array.meminfo.type(None)
    array.parent = array.parent.type(None)
    return array._getvalue()


@intrinsic
def _put(typing: Any, frame: Any, arguments: Any, ranged: Any) -> Any:
    """Put arguments into a frame, and the function that takes them from there, for a range."""

    def generate(context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        taken = (arguments, types.int64, types.int64)
        compiled = ranged.dispatcher.get_compile_result(ranged.get_call_type(typing, taken, {}))
        context.active_code_library.add_linking_library(compiled.library)
        model = context.data_model_manager[arguments]
        if context.get_abi_sizeof(model.get_data_type()) > 8 * (FRAME - 1):
            raise NotImplementedError("arguments take more than there is room for")

        pointer, word, one = ir.IntType(8).as_pointer(), ir.IntType(64), ir.Constant(ir.IntType(64), 1)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word])
        entry = ir.Function(builder.module, kind, f"{builder.function.name}.entry")
        entry.linkage = "internal"
        inner = ir.IRBuilder(entry.append_basic_block())
        room = inner.gep(inner.inttoptr(entry.args[0], word.as_pointer()), [one])
        given = model.load_from_data_pointer(inner, inner.bitcast(room, model.get_data_type().as_pointer()))
        parts = [given, *entry.args[1:]]
        context.call_internal_no_propagate(inner, compiled.fndesc, compiled.signature, parts)
        inner.ret_void()

        to, room = (_address(context, builder, args[0], frame, ir.Constant(word, at)) for at in range(2))
        builder.store(builder.ptrtoint(entry, word), to)
        room = builder.bitcast(builder.bitcast(room, pointer), model.get_data_type().as_pointer())
        builder.store(model.as_data(builder, _borrowed(context, builder, arguments, args[1])), room, align=8)
        return context.get_dummy_value()

    return signature(types.none, frame, arguments, ranged), generate


@intrinsic
def _call(_typing: Any, place: Any, lo: Any, hi: Any) -> Any:
    """Call the function in a frame for a range."""

    def generate(context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word, word, word]).as_pointer()
        entry = builder.load(builder.inttoptr(args[0], word.as_pointer()))
        builder.call(builder.inttoptr(entry, function), args)
        return context.get_dummy_value()

    return signature(types.none, types.int64, types.int64, types.int64), generate


@inline
def _joined(memory):
    """Whether this thread takes part from now on: there is work, and fewer do than may."""
    while True:
        state = _load(memory, STATE)
        if state < OPEN or state % MANY >= state % OPEN // MANY:
            return False
        if _swap(memory, STATE, state, state + 1):
            return True


@inline
def _drain(memory):
    """Take ranges of a stage until there are none."""
    stage = memory[JOB]
    count = _word(stage, COUNT)
    while True:
        number = _add(memory, NEXT, 1)
        if number >= count:
            break
        part, first = stage + 8 * PARTS, 0
        while number >= _word(part, LAST):
            first = _word(part, LAST)
            part += 8 * PART
        step = _word(part, STEP)
        lo = (number - first) * step
        _call(_word(part, PLACE), lo, min(lo + step, _word(part, ITEMS)))
    _and(memory, STATE, OPEN - 1)


@kernel
def work(memory, turns):
    """Take part in whatever is to be done, until nothing was for so many turns."""
    left = turns
    while left > 0:
        if _joined(memory):
            _drain(memory)
            _add(memory, STATE, -1)
            left = turns
        else:
            _pause()
            left -= 1


@subroutine
def _done(memory, stage, helpers, turns):
    """Do a stage, with help; whether nobody works any more."""
    memory[JOB] = stage
    _store(memory, NEXT, 0)
    if helpers > 0:
        _store(memory, STATE, OPEN + MANY * helpers)
    _drain(memory)
    left = turns
    while _load(memory, STATE) % MANY:
        left -= 1
        if left < 0:
            return False
        _pause()
    return True


@kernel
def run_stages(memory, stages, at, helpers, turns):
    """Do stages from one on; where the next one is, negative if somebody still works on the one before."""
    while at < len(stages):
        stage = address_of(stages, at)
        most = min(stages[at + HELPERS], helpers)
        at += stages[at + WORDS]
        if not _done(memory, stage, most, turns):
            return -at
    return at


def _shared(function: Callable[..., Any], name: str) -> Callable[..., bool]:
    """``(memory, frame, arguments, n, step, helpers, turns) -> bool``: whether nobody works any more.

    With no ``turns`` the frame is filled, and nothing is done: compiled apart, the function would be compiled again.
    """
    part = subroutine(function)

    def ranged(arguments, lo, hi):
        part(*(arguments + (lo, hi)))  # noqa: RUF005  (numba knows no other way)

    ranged.__qualname__ = f"{name}.ranged"
    called = subroutine(ranged)

    def share(memory, frame, arguments, n, step, helpers, turns):
        _put(frame, arguments, called)
        if turns == 0:
            return True
        count = -(-n // step)
        memory[STAGE + COUNT] = count
        part = STAGE + PARTS
        memory[part + PLACE], memory[part + ITEMS] = address_of(frame, 0), n
        memory[part + STEP], memory[part + LAST] = step, count
        return _done(memory, address_of(memory, STAGE), helpers, turns)

    share.__qualname__ = name
    return kernel(share)


class Shared:
    """What multiplies ranges, on several threads.

    Example:
        ``Shared(f)(arguments, n, grain=g)`` calls ``f(*arguments, lo, hi)`` on ranges that together cover ``[0, n)``
        once each; every ``lo`` is a multiple of ``g``, and every ``hi`` but the last.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Nothing is compiled yet.

        Args:
            function: for numba; raises nothing, and what it does for an item does not depend on the range. Its
                ``__qualname__`` is the kernel's.
        """
        self._share = _shared(function, function.__qualname__)

    def __call__(self, arguments: tuple[Any, ...], n: int, *, grain: int = 1) -> None:
        """Call it.

        Args:
            arguments: arrays, numbers, and tuples of them.
            n: number of items.
            grain: the smallest range worth a thread, or the alignment that the function needs.
        """
        threads = 1 if n <= grain else min(num_threads(), -(-n // grain))
        if threads == 1 or not _crew().share(self._share, arguments, n, grain, threads - 1):
            self._share(np.zeros(SIZE, np.int64), np.zeros(FRAME, np.int64), arguments, n, max(n, 1), 0, 1)

    def frame(self, arguments: tuple[Any, ...]) -> Memory:
        """What calls it with these arguments, as part of a stage; they are to be kept as long as that."""
        made: Memory = np.zeros(FRAME, np.int64)
        self._share(made, made, arguments, 0, 1, 0, 0)
        return made


class _Crew:
    """Threads, as many as were ever asked for, and the memory that they look at."""

    def __init__(self) -> None:
        self._memory: Memory = np.zeros(SIZE, np.int64)
        self._frame: Memory = np.zeros(FRAME, np.int64)
        self._turns = _turns()
        self._asleep: list[threading.Lock] = []
        self._threads: list[threading.Thread] = []
        self._one = threading.Lock()
        self._held: tuple[Any, ...] = ()
        self._over = False
        atexit.register(self.end)

    def share(self, kernel: Callable[..., bool], arguments: tuple[Any, ...], n: int, grain: int, helpers: int) -> bool:
        """Whether it was done: threads help one caller at a time."""
        if not self._one.acquire(blocking=False):
            return False
        memory = self._memory
        try:
            self._wait()  # for what was interrupted
            self._call(helpers)
            step = -(-n // (grain * (helpers + 1) * RANGES)) * grain
            self._held = memory, arguments  # whatever happens here, nobody writes to memory that is gone
            if not kernel(memory, self._frame, arguments, n, step, helpers, self._turns):
                self._wait()
            self._held = ()
        finally:
            self._one.release()
        return True

    def run(self, stages: Memory, held: Any, helpers: int) -> bool:
        """:meth:`share` of stages, whose parts ``held`` keeps."""
        if not self._one.acquire(blocking=False):
            return False
        memory, turns, at = self._memory, self._turns, 0
        try:
            self._wait()
            self._call(helpers)
            self._held = memory, stages, held
            while at < len(stages):
                at = run_stages(memory, stages, at, helpers, turns)
                if at < 0:
                    self._wait()
                    at = -at
            self._held = ()
        finally:
            self._one.release()
        return True

    def _wait(self) -> None:
        while self._memory[STATE] % MANY:
            time.sleep(0)

    def _call(self, helpers: int) -> None:
        """Have so many threads look for work."""
        while len(self._threads) < helpers and not self._over:
            thread = threading.Thread(target=self._serve, name=f"uqff {len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more, or Python ends: those that there are will do
                break
            self._threads.append(thread)
        for _ in range(min(helpers - len(self._threads) + len(self._asleep), len(self._asleep))):
            self._asleep.pop().release()

    def _serve(self) -> None:
        rest = threading.Lock()
        rest.acquire()
        while not self._over:
            work(self._memory, self._turns)
            self._asleep.append(rest)
            if not self._over:  # or nobody would look there any more
                rest.acquire()

    def end(self) -> None:
        """Have no threads: none is to run compiled code once there is none."""
        self._over = True
        while self._asleep:
            self._asleep.pop().release()
        for thread in self._threads:
            thread.join()


def _turns() -> int:
    """As many as a thread looks for work in :data:`PATIENCE`."""
    nothing, count, least = np.zeros(SIZE, np.int64), 256, 1.0
    for _ in range(8):
        begun = time.perf_counter()
        work(nothing, count)
        least = min(least, time.perf_counter() - begun)
    return max(int(PATIENCE / least * count), 1)


_made = threading.Lock()
_crews: list[_Crew] = []


def _crew() -> _Crew:
    if not _crews:
        with _made:
            if not _crews:
                _crews.append(_Crew())
    return _crews[0]


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _made
    _made = threading.Lock()
    for crew in _crews:
        atexit.unregister(crew.end)
    _crews.clear()


after_fork(_forget)
