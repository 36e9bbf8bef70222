"""What Windows and macOS lack is called in few places, and the rest works where it is not there."""

from __future__ import annotations

import ast
import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest

import uqff
from tests.support.golden_models import TinyModel
from tests.support.tiny_files import ROOT
from uqff.container.leftovers import try_lock
from uqff.models.template import render
from uqff.system import advice, can_lock, loaded_library, lock, open_to_lock, usable_cpus

MODULES = {"fcntl", "resource", "msvcrt", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "_posixsubprocess"}
"""Of the standard library, those that some systems do not have."""

EVERYWHERE = {
    "os": {
        *("DirEntry", "O_CREAT", "O_RDONLY", "O_RDWR", "O_WRONLY", "PathLike", "_exit", "close", "devnull", "dup"),
        *("dup2", "environ", "fspath", "fstat", "fsync", "listdir", "name", "open", "path", "rename", "replace"),
        *("rmdir", "scandir", "stat", "strerror", "unlink"),
    },
    "signal": {"SIGINT", "SIGTERM", "SIG_DFL", "default_int_handler", "getsignal", "signal"},
    "mmap": {"PAGESIZE", "mmap"},
    "shutil": {"copy2", "copyfile", "copyfileobj", "copytree", "disk_usage", "get_terminal_size", "rmtree"},
}
"""What the package uses of modules that lack some names on some systems: Python has these on every system."""

MISSING = {
    *("fork", "link", "pread", "pwrite", "getuid", "mkfifo", "posix_fallocate", "posix_fadvise", "killpg", "setsid"),
    *("sched_getaffinity", "register_at_fork", "fchmod", "chown", "sendfile", "copy_file_range", "fdatasync"),
}
"""Of ``os``, some that Windows does not have."""

METHODS = {"madvise", "sendmsg", "recvmsg"}
"""Of objects."""

LOOKING = {"getattr", "hasattr", "CDLL"}
"""Calls that find what is not named."""

ALONE = "system.py"
"""The module that may use all else, after it has asked whether it is there."""


def used(path: Path) -> set[str]:
    """What a module uses that some systems do not have."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & MODULES
            if node.module in EVERYWHERE:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} - _everywhere(node.module)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & METHODS
            if isinstance(node.value, ast.Name) and (name := node.value.id.removeprefix("_")) in EVERYWHERE:
                found |= {f"{name}.{node.attr}"} - _everywhere(name)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOOKING:
            found |= {ast.unparse(node)} & {"ctypes.CDLL(None, use_errno=True)"}
            if ast.unparse(node.args[0]).removeprefix("_") in EVERYWHERE:
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("/proc", "/dev", "/sys")):
            found.add(str(node.value))
    return found


def _everywhere(module: str) -> set[str]:
    return {f"{module}.{name}" for name in EVERYWHERE[module]}


def test_where_it_is_called() -> None:
    """In one module, whose test this is: a second one would be found on the system that lacks it."""
    places = {path.relative_to(ROOT / "uqff").as_posix(): used(path) for path in (ROOT / "uqff").rglob("*.py")}
    assert {name: found for name, found in places.items() if found and name != ALONE} == {}
    assert {"fcntl", "resource", "os.link", "os.sched_getaffinity", "signal.setitimer", "madvise"} <= places[ALONE]


@pytest.mark.skipif(not can_lock(), reason="no locks here")
def test_locks(tmp_path: Path) -> None:
    """One at a time, until it is closed; a link leads nowhere."""
    first, second = open_to_lock(tmp_path), open_to_lock(tmp_path)
    assert lock(first)
    assert not lock(second)
    os.close(first)
    assert lock(second)
    os.close(second)
    (tmp_path / "link").symlink_to(tmp_path)
    assert try_lock(tmp_path / "link") is None


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without locks, private mappings, advice on memory, exchanges of names, alarms and forks."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module, known in ((mmap, {"PAGESIZE", "mmap", "error"}), (sys.modules["_signal"], EVERYWHERE["signal"])):
        for name in dir(module):
            if name.startswith(("MADV_", "MAP_", "PROT_", "SIG", "ITIMER", "setitimer")) and name not in known:
                monkeypatch.delattr(module, name)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "RTLD_NOLOAD", *MISSING):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as there; newer Pythons would ask for O_NONBLOCK
    monkeypatch.setattr("uqff.container.staging.exchange", lambda one, other: False)


def test_the_same_is_made_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is quantised, replaced, gone on with, migrated, converted and read, to the same bytes."""
    monkeypatch.setenv("UQFF_KERNELS", "reference")
    monkeypatch.chdir(tmp_path)
    TinyModel(hidden_size=64, intermediate_size=64, heads=2, layers=1).write(tmp_path / "source")

    def made(where: str) -> dict[str, bytes]:
        for force in (False, True):
            uqff.quantize_model("source", f"{where}/model", "q8_0", measure=False, force=force, resume=True)
        uqff.migrate(f"{where}/model", f"{where}/old", "0.2")
        uqff.convert(f"{where}/model", f"{where}/model.gguf")
        uqff.convert(f"{where}/model.gguf", f"{where}/again")
        assert uqff.verify(f"{where}/again", deep=True).clean
        files = sorted(path for path in Path(where).rglob("*") if path.is_file())
        return {path.relative_to(where).as_posix(): path.read_bytes() for path in files}

    for where in ("with", "without"):
        Path(where).mkdir()
    expected = made("with")
    hide(monkeypatch)
    assert (can_lock(), advice("DONTNEED"), loaded_library(Path("no.so")), usable_cpus()) == (
        False,
        None,
        None,
        os.cpu_count(),
    )
    assert render("{{ a }}", {"a": 1}) == "1"
    assert made("without") == expected
    assert len(expected) > 8
