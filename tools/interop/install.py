"""The clients, each in a virtual environment of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]


def has(package: str, version: str) -> bool:
    """Whether this very interpreter has a package in that version."""
    try:
        return metadata.version(package) == version
    except metadata.PackageNotFoundError:
        return False


def install_client(version: str, package: str = "mistralrs", *others: str) -> Path:
    """The interpreter of `.venvs/<package>-<version>`, which is made from this interpreter and PyPI if absent.

    mistralrs, and a package with `others` beside it, are installed without what they depend on.

    Raises click.ClickException with pip's output if that fails.
    """
    folder = ROOT / ".venvs" / f"{package}-{version}"
    options = ["--no-deps"] if package == "mistralrs" or others else []
    options += [] if sys.dont_write_bytecode else ["--no-compile"]  # Python compiles what is imported, when it is
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *options, f"{package}=={version}", *others],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    (folder / "ready").touch()
    return python
