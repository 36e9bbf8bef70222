"""Ctrl-C: exit code 130 and no word, wherever it comes; what would swallow it or print it is made to happen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_files import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")

BEGIN = """
import os, signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
import uqff.cli
from uqff.__main__ import run

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.001)  # so that the interpreter looks at what has come

def command(function):
    sys.modules["a_command"] = types.ModuleType("a_command")
    sys.modules["a_command"].it = uqff.cli.click.command()(function)
    uqff.cli.COMMANDS["inspect"] = ("a_command:it", "")
    sys.argv = ["uqff", "inspect"]
    run()
"""


def _run(script: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_in_a_command(tmp_path: Path) -> None:
    """It is an exception, so that what the command has begun is put in order."""
    script = f"""
def work():
    try:
        interrupt()
    finally:
        open({str(tmp_path / "tidy")!r}, "w").close()
command(work)
"""
    assert _run(script) == (130, "", "")
    assert (tmp_path / "tidy").exists()


def test_in_an_import_that_would_hide_it(tmp_path: Path) -> None:
    """C code that imports makes an ImportError of whatever it gets: nothing is raised before the import has ended."""
    (tmp_path / "hides.py").write_text(
        "import __main__\ntry:\n    __main__.interrupt()\nexcept BaseException:\n    raise ImportError('hidden')\n"
        "print('imported', flush=True)\n"
    )
    script = f"""
def work():
    sys.path.insert(0, {str(tmp_path)!r})
    import hides
    time.sleep(30)
    print("not reached")
command(work)
"""
    assert _run(script) == (130, "imported\n", "")


@pytest.mark.parametrize(("pause", "again"), [(0.0, 1.5), (0.3, 0.02)])
def test_a_second_one_does_not_wait_for_an_import(tmp_path: Path, pause: float, again: float) -> None:
    """``import torch`` takes seconds. Two at once are one: a shell's group and its leader may both be told."""
    (tmp_path / "long.py").write_text(
        "import __main__, time\n__main__.interrupt()\n"
        f"end = time.monotonic() + {pause}\nwhile time.monotonic() < end: pass\n"
        "__main__.interrupt()\nprint('imported', flush=True)\n"
    )
    script = f"""
import uqff.interrupts
uqff.interrupts.AGAIN = {again}
def work():
    sys.path.insert(0, {str(tmp_path)!r})
    import long
    time.sleep(30)
    print("not reached")
command(work)
"""
    assert _run(script) == (130, "" if pause else "imported\n", "")


def test_an_import_without_an_end_is_not_waited_for(tmp_path: Path) -> None:
    """With other work on the machine, those of ``uqff run`` take half a minute, in which nobody wants to wait."""
    (tmp_path / "long.py").write_text(
        "import __main__, time\n__main__.interrupt()\nend = time.monotonic() + 30\n"
        "while time.monotonic() < end: pass\nprint('imported', flush=True)\n"
    )
    script = f"""
import uqff.interrupts
uqff.interrupts.LONGEST = 0.1
def work():
    sys.path.insert(0, {str(tmp_path)!r})
    import long
    print("not reached")
command(work)
"""
    assert _run(script) == (130, "", "")


def test_in_a_library_that_python_waits_for() -> None:
    """Loading torch's takes seconds from a busy disk, in which no line of Python runs: a signal ends the process that
    has no handler. Before and after it, and of any other module in C, all is as ever.
    """
    script = """
from importlib.machinery import ExtensionFileLoader, ModuleSpec
def load(self, spec):
    print(spec.name, signal.getsignal(signal.SIGINT) is signal.SIG_DFL, flush=True)
    if spec.loader_state: os.kill(os.getpid(), signal.SIGINT)
ExtensionFileLoader.create_module = load
def work():
    loader = ExtensionFileLoader("torch._C", "nowhere")
    for name, killed in (("numpy", None), ("torch._C", None), ("numpy", None), ("torch._C", True)):
        loader.create_module(ModuleSpec(name, loader, loader_state=killed))
    print("not reached")
command(work)
"""
    told = "numpy False\ntorch._C True\nnumpy False\ntorch._C True\n"
    assert _run(script) == (-signal.SIGINT, told, "")


@pytest.mark.parametrize(
    "dying",
    [
        "class It:\n    def __del__(self): interrupt()\ndef die(): It()\n",
        "import weakref\nclass It: pass\ndef die(): it = It(); r = weakref.ref(it, lambda _: interrupt()); del it\n",
    ],
    ids=["del", "callback"],
)
def test_where_python_would_print_and_forget_it(dying: str) -> None:
    """In a ``__del__``, and in a callback, of which only the hook hears that is told what cannot be raised."""
    script = """
def work():
    die()
    print("dead", flush=True)
    time.sleep(30)
    print("not reached")
command(work)
"""
    assert _run(dying + script) == (130, "dead\n", "")


def test_before_and_after_a_command() -> None:
    """While arguments are parsed, and when all is done."""
    before = """
uqff.cli.LazyGroup.make_context = lambda *_, **__: interrupt()
command(lambda: None)
"""
    after = """
class Out:
    def __getattr__(self, name): return getattr(sys.__stdout__, name)
    def flush(self): interrupt()
sys.stdout = Out()
command(lambda: None)
"""
    assert _run(before) == (130, "", "")
    assert _run(after) == (130, "", "")


def test_what_is_to_do_nothing_does_nothing() -> None:
    """A shell lets what runs in the background ignore it."""
    script = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
command(interrupt)
"""
    assert _run(script) == (0, "", "")


def test_the_first_imports_are_few() -> None:
    """What is imported before Ctrl-C is caught is this package's own, and nothing that takes time."""
    script = "import os, sys; sys.path.insert(0, '.'); before = {*sys.modules}; import uqff.__main__"
    script += "\nprint(sorted({*sys.modules} - before))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "['uqff', 'uqff.__main__', 'uqff._version', 'uqff.interrupts', 'uqff.system']\n"
