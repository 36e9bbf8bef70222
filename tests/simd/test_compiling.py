"""A compiled kernel never outlives the sources it was made of."""

from __future__ import annotations

import ast
import errno
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.registry import cpu_target

from uqff.simd import compiling, finite
from uqff.simd.scratch import scratch, scratch_rows

PYTHON_ONLY = {"codes", "system"}
"""What kernels' modules take from elsewhere to use it outside compiled code."""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of one function, beside which numba may keep its cache, and which it can import again."""
    path = tmp_path / "tiny.py"
    path.write_text("def double(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("tiny", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tiny", made)
    spec.loader.exec_module(made)
    return made


def hits_and_misses(function: Any) -> tuple[int, int]:
    """What numba's cache said to the first call of a new kernel."""
    compiled = compiling.kernel(function)
    assert compiled(21) == 42
    return sum(compiled.stats.cache_hits.values()), sum(compiled.stats.cache_misses.values())


def test_another_stamp_compiles_again(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the function has not changed, so numba alone would take the old code."""
    assert hits_and_misses(module.double) == (0, 1)
    assert hits_and_misses(module.double) == (1, 0)
    monkeypatch.setattr(compiling, "stamp", lambda: "of other sources")
    assert hits_and_misses(module.double) == (0, 1)
    assert hits_and_misses(module.double) == (1, 0)


def test_processes_that_begin_together_keep_their_own_code(module: ModuleType) -> None:
    """Each has seen no cache when it writes; the index must not name code that is for other types of arguments."""
    whole, fraction = compiling.kernel(module.double), compiling.kernel(module.double)
    files = [compiled._cache._cache_file for compiled in (whole, fraction)]
    save = files[0]._save_data

    def save_after_the_other(name: str, data: Any) -> None:
        files[1]._load_index = dict
        assert fraction(0.5) == 1.0
        save(name, data)

    files[0]._save_data = save_after_the_other
    assert whole(21) == 42
    later = compiling.kernel(module.double)
    assert later(0.75) == 1.5
    assert later(21) == 42


CHILD = """
import importlib.util, logging, sys, time
from uqff.simd import compiling
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
sys.modules["tiny"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
logging.basicConfig(format="%(message)s", level="INFO", stream=sys.stdout)
print("ready", flush=True)
sys.stdin.readline()
assert compiling.kernel(module.double)(21) == 42
"""


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_processes_wait_for_the_one_that_compiles(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks need the same kernels at the same time: one compiles, the others take what it has kept."""
    monkeypatch.setitem(sys.modules, "tiny", module)
    compiled: Any = compiling.kernel(module.double)
    command = [sys.executable, "-c", CHILD, str(module.__file__)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child: Any
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        compiled.alone.take()
        child.stdin.write("go\n")
        child.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        assert compiled(21) == 42  # kept, and then the lock is given
        assert child.stdout.read() == ""
    assert child.returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_no_lock_is_waited_for_without_end(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may hold it and do nothing; or there is no file to be locked."""
    monkeypatch.setattr(compiling._Alone, "patience", 0.05)
    compiled: Any = compiling.kernel(module.double)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, compiled.alone._path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()  # type: ignore[union-attr]
        assert compiled(21) == 42
        holder.communicate(b"\n")
    for failing in (compiling._Alone(str(module.__file__) + "/no/such"), compiled.alone):
        failing.take()
        failing.give()
        failing.give()


def test_a_kernel_that_fails_holds_up_nobody(module: ModuleType) -> None:
    """The lock is given, whatever comes of it."""
    compiled: Any = compiling.kernel(module.double)
    with pytest.raises(numba.TypingError):
        compiled({})
    assert compiled.alone._file == -1
    assert compiled(21) == 42
    assert compiled.alone._file == -1


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_two_threads_give_it_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing lets another thread run, which gives it back as well: no file is closed that is not open any more."""
    alone, closed, close = compiling._Alone(str(tmp_path / "lock")), [], os.close
    alone.take()
    file = alone._file

    def close_beside_another(given: int) -> None:
        closed.append(given)
        if len(closed) == 1:
            alone.give()
        close(given)

    monkeypatch.setattr(os, "close", close_beside_another)
    alone.give()
    assert closed == [file]


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_while_a_kernel_is_compiled(on: bool) -> None:
    """In any thread; then as before."""
    before, states = gc.isenabled(), []
    (gc.enable if on else gc.disable)()
    try:
        with compiling._UNCOLLECTED:
            with compiling._UNCOLLECTED:
                states.append(gc.isenabled())
            states.append(gc.isenabled())
        assert [*states, gc.isenabled()] == [False, False, on]
    finally:
        (gc.enable if before else gc.disable)()


def test_kernels_are_compiled_so_also_those_that_fail(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[bool] = []
    define = compiling._KernelCompiler.define_pipelines

    def define_and_look(self: Any) -> list[Any]:
        states.append(gc.isenabled())
        return define(self)

    monkeypatch.setattr(compiling._KernelCompiler, "define_pipelines", define_and_look)
    compiled = compiling.kernel(module.double)
    with pytest.raises(numba.TypingError):
        compiled(None)
    assert compiled(21) == 42
    assert [*states, gc.isenabled()] == [False, False, True]


def test_code_of_other_sources_goes(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of a source would leave files for good."""
    folder = Path(str(module.__file__)).parent
    for stamp in ("of some sources", "of others"):
        monkeypatch.setattr(compiling, "stamp", lambda stamp=stamp: stamp)
        compiled = compiling.kernel(module.double)
        assert [compiled(21), compiled(0.5)] == [42, 1.0]
        assert len(list(folder.rglob("*.nbc"))) == 2


def test_without_sources_nothing_is_kept(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "stamp", lambda: "")
    for _ in range(2):
        assert hits_and_misses(module.double)[0] == 0
    assert not list(Path(str(module.__file__)).parent.rglob("*.nbi"))


def test_without_a_place_for_a_cache_kernels_work() -> None:
    """A function of no file stands for an installation that cannot be written to."""
    namespace: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x\n", namespace)
    assert compiling.kernel(namespace["double"])(21) == 42


@pytest.mark.parametrize("part", [compiling.inline, compiling.subroutine])
def test_parts_of_kernels_are_not_for_python(part: Any, module: ModuleType) -> None:
    """They have no machine code of their own: a call would end the process, first or after a kernel's."""
    double = part(module.double)
    for _ in range(2):
        with pytest.raises(TypeError, match="double is for kernels"):
            double(21)
        assert numba.njit(lambda x: double(x))(21) == 42


def test_parts_are_compiled_only_as_parts(module: ModuleType) -> None:
    """Machine code of each by itself took half of the time of a kernel's first use."""
    double: Any = compiling.inline(module.double)
    assert numba.njit(lambda x: double(x))(21) == 42
    (made,) = double.overloads.values()
    engine = made.library.codegen._engine
    assert not any(engine.is_symbol_defined(function.name) for function in made.library.get_defined_functions())


def test_scratch_is_an_array() -> None:
    """Of either number of dimensions, apart from other arrays, aligned to a cache line."""

    def fill(out: Any) -> Any:
        a, b = scratch(3, np.int32), scratch_rows(2, 5, np.float64)
        for i in range(3):
            a[i] = i
        for i in range(2):
            for j in range(5):
                b[i, j] = 10 * i + j
        out[:3] = a
        out[3:] = b.reshape(-1)
        return a.shape, b.shape, (a.ctypes.data | b.ctypes.data) % 64

    out = np.zeros(13)
    assert numba.njit(fill)(out) == ((3,), (2, 5), 0)
    assert out.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_kernels_carry_the_stamp() -> None:
    """The attribute of numba that takes it is not public: this fails when it moves."""
    kernel: Any = finite.peak_magnitudes
    assert kernel._cache._cache_file._source_stamp == compiling.stamp()
    assert len(compiling.stamp()) == 64


CHANGED = (
    "simd/bits.py",
    "simd/vectors.py",
    "numerics/packing.py",
    "families/hqq/tensor.py",
    "families/afq/cpu.py",
)


@pytest.mark.parametrize("changed", CHANGED)
def test_the_stamp_sees_every_source(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in compiling.SOURCES:
        shutil.copytree(compiling.PACKAGE / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiling, "PACKAGE", tmp_path)
    assert compiling.stamp.__wrapped__() == compiling.stamp()
    source = (tmp_path / changed).read_bytes()
    (tmp_path / changed).write_bytes(source[:-2] + b"#\n")  # of the same length
    assert compiling.stamp.__wrapped__() != compiling.stamp()


def imported(path: Path) -> Iterator[str]:
    """Modules outside the stamped packages that a module imports when it is loaded."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uqff"):
            for each in node.names:
                inside = f"{node.module}.{each.name}".removeprefix("uqff.")
                file = compiling.PACKAGE / (inside.replace(".", "/") + ".py")
                module = inside if file.is_file() else inside.rpartition(".")[0]
                if module and not module.startswith(compiling.SOURCES):
                    yield module


def test_no_source_is_forgotten() -> None:
    """Whoever lets a kernel take numbers from another package adds that package to the stamp."""
    folders = compiling.PACKAGE / "simd", compiling.PACKAGE / "families"
    kernels = [*folders[0].glob("*.py"), *folders[1].rglob("cpu*.py")]
    assert {module for path in kernels for module in imported(path)} == PYTHON_ONLY


def test_vectors_are_as_wide_as_the_cpu_likes(module: ModuleType) -> None:
    """What asks for 512 bits goes through parts of numba that may move; results do not depend on it."""
    compiled: Any = compiling.kernel(module.double)
    assert compiled(21) == 42
    (code,) = compiled.inspect_llvm().values()
    assert ('"prefer-vector-width"="512"' in code) == compiling._widest_vectors_pay()


@pytest.mark.parametrize(
    ("features", "pays"),
    [
        ("+avx2,+f16c", False),
        ("+avx512f,+avx512bw,+avx512vl,-avx512vbmi2", False),
        ("+avx512bw,+avx512f,+avx512vbmi2,+avx512vl", True),
    ],
)
def test_widest_vectors_are_for_cpus_that_keep_their_clock(
    features: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for AVX2, nor for the first CPUs with AVX-512."""

    class Codegen:
        def magic_tuple(self) -> tuple[str, str, str]:
            return "x86_64", "cpu", features

    monkeypatch.setattr(cpu_target.target_context, "codegen", Codegen)
    assert compiling._widest_vectors_pay.__wrapped__() is pays


def test_it_is_said_when_a_kernel_is_compiled(module: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and not when it comes from the cache; parts of it are not told of."""
    caplog.set_level("INFO", compiling.LOGGER.name)
    for _ in range(2):
        assert compiling.kernel(module.double)(21) == 42
    assert caplog.messages == ["compiling double for this CPU, once"]


def test_a_full_disk_costs_the_cache_only(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be kept is compiled again, and runs."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    for _ in range(2):
        assert hits_and_misses(module.double) == (0, 1)
