"""What pages list is what there is: packages in their order, targets of make, methods, golden files."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.tiny_files import ROOT
from uqff.checkpoints.methods import METHODS
from uqff.cli import main

ENTRY_POINTS = {"__init__", "__main__", "_version", "run"}
PACKAGES = {path.stem for path in (ROOT / "uqff").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def contracts() -> list[dict[str, Any]]:
    tomllib = importlib.import_module("tomllib")
    found: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_table_of_packages() -> None:
    """All of them, none above one that it imports: the order is that of the contract."""
    page = (ROOT / "docs/pages/how.md").read_text("utf-8")
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)]
    assert sorted(name for row in rows for name in row) == sorted(PACKAGES - ENTRY_POINTS)
    layers = next(each["layers"] for each in contracts() if each["name"] == "The layers")
    height = {name: at for at, layer in enumerate(reversed(layers)) for name in layer.split(" | ")}
    heights = [height[name] for row in rows for name in row]
    assert heights == sorted(heights)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
@pytest.mark.parametrize(
    ("name", "knowing"),
    [
        ("Only the command line knows click and rich", {"cli"}),
        ("Only simd knows numba and llvmlite", {"simd"}),
    ],
)
def test_contracts_are_about_every_package(name: str, knowing: set[str]) -> None:
    """One that is left out may import what it likes."""
    (sources,) = (each["source_modules"] for each in contracts() if each["name"] == name)
    assert sorted(sources) == sorted(f"uqff.{name}" for name in PACKAGES - ENTRY_POINTS - knowing)


def test_the_targets_of_make() -> None:
    """CONTRIBUTING lists those that a change may need."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (listed,) = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)", listed)) == set(targets.split()) - {"help", "demo", "clean"}


def test_packages_that_contributing_names() -> None:
    """What it says of where things go is about packages that exist."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    where = text.split("## Where things go")[1].split("\n## ")[0]
    assert {name.rstrip("/") for name in re.findall(r"`(\w+/?)`", where)} <= PACKAGES


def test_methods_of_quantising_in_the_help() -> None:
    """Of ``uqff quantize``, each by one of its names."""
    text = " ".join(CliRunner().invoke(main, ["quantize", "--help"]).output.lower().split())
    (listed,) = re.findall(r"quantised itself \((.*?)\)", text)
    names = listed.split(", ")
    assert [method.NAMES for method in METHODS if not set(method.NAMES) & set(names)] == []


def test_golden_files_are_said_to_be_there() -> None:
    """By their page, with where they come from."""
    text = (ROOT / "tests/golden/README.md").read_text("utf-8")
    names = {path.name for path in (ROOT / "tests/golden").iterdir()} - {"README.md"}
    assert {name for name in names if not re.search(rf"`(?:{re.escape(name)}|{re.escape(name)}/[^`]*)`", text)} == set()


def test_the_source_distribution_has_what_it_refers_to() -> None:
    """What stands beside the package, and what README links to."""
    (listed,) = re.findall(r"targets.sdist\]\ninclude = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"))
    names = set(re.findall(r'"([^"]+)"', listed))
    links = re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    assert {Path(link).parts[0] for link in links} <= names
    assert all((ROOT / name).exists() for name in names)
