"""The public API: complete, sorted, typed, documented, light to import, and of the version the changelog names."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uqff

ROOT = Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(uqff.__path__, "uqff.") if not m.name.endswith("__main__"))


def test_all_is_complete_and_sorted() -> None:
    """What ``__init__`` imports is what it exports, no more, no less."""
    tree = ast.parse((ROOT / "uqff" / "__init__.py").read_text("utf-8"))
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if not (alias.asname or alias.name).startswith("_")
    ]
    assert sorted(imported) == sorted(uqff.__all__)
    assert list(uqff.__all__) == sorted(uqff.__all__)
    assert len(set(uqff.__all__)) == len(uqff.__all__)


@pytest.mark.parametrize("name", uqff.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    """A name without a docstring is not public yet."""
    thing = getattr(uqff, name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert inspect.getdoc(thing), name


@pytest.mark.parametrize("module", MODULES)
def test_all_of_every_module_names_what_is_there(module: str) -> None:
    """``__all__`` of the inner rooms does not drift either."""
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    names = getattr(loaded, "__all__", [])
    assert [name for name in names if not hasattr(loaded, name)] == []
    assert len(set(names)) == len(names)


def test_typed_marker_ships() -> None:
    """Type checkers believe the annotations only with it."""
    assert (ROOT / "uqff" / "py.typed").is_file()


def test_version_is_the_newest_of_the_changelog() -> None:
    """The changelog cannot drift from the version."""
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings
    assert headings[0] == uqff.__version__


def test_import_is_light() -> None:
    """``import uqff`` costs neither torch nor numba."""
    code = "import sys, uqff; assert not {'torch', 'numba'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_parallel_is_there_without_an_import_of_its_own() -> None:
    """``uqff.parallel`` after ``import uqff``, and what needs no torch in it imports none."""
    code = (
        "import sys, uqff; assert 'parallel' in dir(uqff) and 'uqff.parallel' not in sys.modules\n"
        "assert uqff.parallel.Shard.simple(0, 1, 2) == uqff.parallel.Shard.simple(0, 1, 2)\n"
        "assert 'torch' not in sys.modules, 'heavy import'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'uqff' has no attribute 'nothing'"):
        uqff.nothing  # noqa: B018
