"""What README and documentation show works as it is shown: Python blocks run, commands run, names and options exist."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import uqff
from uqff.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """What stands behind the language of each block, and its text."""
    for found, rest, text in BLOCK.findall(page.read_text("utf-8")):
        if found == language:
            yield rest.strip(), text


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


GIVEN = {
    "docs/pages/index.md": ("checkpoint",),
    "docs/pages/tasks/quantize.md": ("checkpoint",),
    "docs/pages/tasks/recipes.md": ("checkpoint", "recipe.yaml"),
    "docs/pages/tasks/lora.md": ("checkpoint", "adapter"),
    "docs/pages/tasks/inspect.md": ("model",),
    "docs/pages/tasks/compare.md": ("checkpoint", "model"),
    "docs/pages/tasks/migrate.md": ("old",),
    "docs/pages/tasks/convert.md": ("model.gguf",),
    "docs/pages/tasks/dequantize.md": ("model",),
    "docs/pages/tasks/run.md": ("model",),
    "docs/pages/tasks/transformers.md": ("checkpoint", "model"),
    "docs/pages/tasks/plan.md": ("checkpoint", "text.txt"),
    "docs/pages/tasks/calibrate.md": ("checkpoint", "text.txt"),
    "docs/pages/tasks/evaluate.md": ("checkpoint", "model", "text.txt"),
}
"""Pages whose commands and Python blocks find something, and what is there before the first."""


def give(page: str, given: Path, folder: Path) -> None:
    """Copy what a page finds."""
    for name in GIVEN.get(page, ()):
        (shutil.copytree if (given / name).is_dir() else shutil.copy)(given / name, folder / name)


WITH_PYTHON = [page for page in PAGES if any("notest" not in rest for rest, _ in blocks(page, "python"))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page: Path, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them."""
    give(name_of(page), given, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "__main__"}
    for rest, text in blocks(page, "python"):
        if "notest" not in rest:
            exec(compile(text, name_of(page), "exec"), space)


def commands(page: Path) -> Iterator[tuple[bool, list[str]]]:
    """Whether a block is to be run, and each ``uqff`` command in it without the word itself."""
    for rest, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["uqff"]:
                yield "notest" not in rest, words[1:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_the_options_that_pages_show(page: Path) -> None:
    for _, words in commands(page):
        command = main.get_command(None, words[0])  # type: ignore[arg-type]
        assert command is not None, words
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


MODULES = {"families", "lora", "parallel"}
"""Their contents have pages; ``uqff.Shard`` is ``uqff.parallel.Shard``."""


def test_every_public_name_is_documented() -> None:
    """A page of the API shows each of them, by the name under which it is imported."""
    shown = {name for page in PAGES for name in re.findall(r"^::: uqff\.([\w.]+)$", page.read_text("utf-8"), re.M)}
    errors = {name for name in uqff.__all__ if name.endswith(("Error", "Warning"))}
    assert set(uqff.__all__) - errors - {"Shard", *MODULES} - {name.partition(".")[0] for name in shown} == set()


@pytest.mark.parametrize("page", GIVEN)
def test_commands_run(page: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(page, given, tmp_path)
    monkeypatch.chdir(tmp_path)
    for to_run, words in commands(ROOT / page):
        if to_run:
            done = CliRunner().invoke(main, words, catch_exceptions=False)
            assert done.exit_code == 0, (words, done.output)
