"""The examples in the docstrings of what is public run and print what they say; every public function has one."""

from __future__ import annotations

import doctest
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest

import uqff
from uqff import lora, parallel

PUBLIC = {
    **{f"uqff.{name}": getattr(uqff, name) for name in uqff.__all__},
    **{f"uqff.lora.{name}": getattr(lora, name) for name in lora.__all__},
    **{f"uqff.parallel.{name}": getattr(parallel, name) for name in parallel.__all__},
}


def examples_of(name: str, thing: Any) -> list[doctest.DocTest]:
    """Those of a function, or of a class and its methods."""
    if inspect.ismodule(thing):
        return []
    module = inspect.getmodule(thing)
    found = doctest.DocTestFinder(recurse=True, exclude_empty=True).find(
        thing, name, module=module, globs={**vars(module), "uqff": uqff}
    )
    return [each for each in found if each.examples]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_examples_run(name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with what ``given`` has: a ``checkpoint``, models made of it, a text."""
    for path in given.iterdir() if examples_of(name, PUBLIC[name]) else ():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for each in examples_of(name, PUBLIC[name]):
        runner.run(each, out=told.append)
    assert not runner.failures, "".join(told)


def test_every_public_function_has_an_example() -> None:
    functions = {name for name, thing in PUBLIC.items() if inspect.isroutine(thing)}
    assert {name for name in functions if not examples_of(name, PUBLIC[name])} == set()
