"""What Windows and macOS lack is called in few places, and the rest works where it is not there."""

from __future__ import annotations

import ast
import mmap
import os
import sys
from pathlib import Path

import pytest

import uqff
from tests.support.golden_models import TinyModel
from tests.support.tiny_files import ROOT
from uqff.container.leftovers import try_lock
from uqff.container.locks import can_lock, lock, open_to_lock

MODULES = {"fcntl", "resource", "msvcrt", "pwd", "grp", "termios", "pty"}
"""Of the standard library, those that some systems do not have."""

CALLS = {"fork", "link", "pread", "pwrite", "getuid", "mkfifo", "posix_fallocate", "posix_fadvise", "killpg", "setsid"}
"""Of ``os``, likewise; ``sched_getaffinity`` is asked for before it is called."""

ALLOWED = {
    "container/locks.py": {"fcntl"},
    "container/mapping.py": {"madvise"},
    "simd/compiling.py": {"fcntl"},  # which may not know containers: without it, each process compiles for itself
    "models/template_child.py": {"resource"},  # of the process that runs a template: without it, no limit of memory
}


def used(path: Path) -> set[str]:
    """The names of what is in one of the two sets, and of advice on mappings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & MODULES
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                found |= {node.attr} & CALLS
            found |= {node.attr} & {"madvise"}
    return found


def test_where_it_is_called() -> None:
    places = {path.relative_to(ROOT / "uqff").as_posix(): used(path) for path in (ROOT / "uqff").rglob("*.py")}
    assert {name: found for name, found in places.items() if found} == ALLOWED


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
    """A system without locks, private mappings, advice on memory, and exchanges of names."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for name in dir(mmap):
        if name.startswith(("MADV_", "MAP_", "PROT_")):
            monkeypatch.delattr(mmap, name)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "sched_getaffinity", *CALLS):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr("uqff.container.exchange.exchange", lambda one, other: False)
    monkeypatch.setattr("uqff.container.staging.exchange", lambda one, other: False, raising=False)


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
    assert made("without") == expected
    assert len(expected) > 8
