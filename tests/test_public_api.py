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
from uqff.families import FAMILIES

ROOT = Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(uqff.__path__, "uqff.") if not m.name.endswith("__main__"))


def test_all_is_what_type_checkers_see() -> None:
    """The imports that type checkers read, the table by which names are imported, and ``__all__`` are one list."""
    tree = ast.parse((ROOT / "uqff" / "__init__.py").read_text("utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module or "").removeprefix("uqff").lstrip(".") or alias.name
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == uqff._MODULE_OF
    assert sorted(uqff.__all__) == list(uqff.__all__) == sorted(seen)
    assert {*uqff.__all__} <= {*dir(uqff)}


def test_every_command_is_a_function() -> None:
    """Of the same name, unless that is a function over one weight, or one of Python's own; and but for ``run``."""
    from uqff.cli import main

    names = {
        "quantize": "quantize_model",
        "dequantize": "dequantize_model",
        "run": "load_model",
        "eval": "evaluate",
        "plan": "plan_types",
    }
    for command in {*main.list_commands(None)} - {"completion"}:  # type: ignore[arg-type]  # which is for a shell
        function = getattr(uqff, names.get(command, command))
        assert command in ("run",) or "progress" in inspect.signature(function).parameters, command


@pytest.mark.parametrize("name", uqff.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    """A name without a docstring is not public yet."""
    thing = getattr(uqff, name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert inspect.getdoc(thing), name


@pytest.mark.parametrize("module", MODULES)
def test_all_of_every_module_names_what_is_there(module: str) -> None:
    """``__all__`` of the inner packages does not drift either."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        pytest.skip("needs vLLM")
    assert loaded.__doc__
    names = getattr(loaded, "__all__", [])
    assert [name for name in names if not hasattr(loaded, name)] == []
    assert len(set(names)) == len(names)


def test_a_name_stands_for_one_class() -> None:
    """In the whole package: who reads a name in a message or a search has found its class."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "uqff").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_families_are_to_be_had_by_module_only() -> None:
    """The contract that families do not know each other relies on it: their packages define and import nothing."""
    packages = sorted((ROOT / "uqff" / "families").glob("*/__init__.py"))
    assert len(packages) == len(FAMILIES)
    for path in packages:
        assert len(ast.parse(path.read_text("utf-8")).body) == 1, path


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
