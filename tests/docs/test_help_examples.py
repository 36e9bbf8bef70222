"""The examples that ``--help`` ends with: they are shown as they stand, parse, and most run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import uqff
from uqff.cli import COMMANDS, main
from uqff.cli.examples import EXAMPLES

LINES = [(name, line) for name, lines in EXAMPLES.items() for line in lines]
RUN = ("inspect", "verify", "diff", "checksum", "report", "migrate", "convert", "dequantize")
"""Commands whose examples are run, if they are not about a repository; those of others are on pages, and run there."""


def test_every_command_has_some() -> None:
    assert list(EXAMPLES) == [name for name in EXAMPLES if name in COMMANDS]
    assert set(EXAMPLES) == set(COMMANDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_shows_them(name: str) -> None:
    """At its end, a line each, on a terminal of eighty columns."""
    shown = CliRunner().invoke(main, [name, "--help"]).output
    lines = "".join(f"    {line}\n" for line in EXAMPLES[name])
    assert shown.endswith(f"\n  Examples:\n{lines}")
    assert max(map(len, lines.splitlines())) <= 80


@pytest.mark.parametrize(("name", "line"), LINES, ids=[line for _, line in LINES])
def test_they_parse(name: str, line: str, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(given)
    words = shlex.split(line)
    assert words[:2] == ["uqff", name]
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_context(name, words[2:], parent=click.Context(main))


def test_they_run(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each command in a folder of its own."""
    monkeypatch.setenv("UQFF_KERNELS", "reference")  # nothing is compiled
    plain = tmp_path / "plain"
    uqff.convert(given / "model.gguf", plain)
    for name in RUN:
        folder = tmp_path / name
        shutil.copytree(given, folder)
        if name in ("convert", "diff"):
            shutil.copytree(plain, folder / "new")
            shutil.rmtree(folder / "model")
            shutil.copytree(plain, folder / "model")
        monkeypatch.chdir(folder)
        for line in EXAMPLES[name]:
            if "owner/name" not in line or "--base-model" in line:
                done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
                assert done.exit_code == 0, (line, done.output)
