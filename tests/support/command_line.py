"""The command line, called within this process."""

from __future__ import annotations

from click.testing import CliRunner

from uqff.cli import main

__all__ = ["call"]


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr
