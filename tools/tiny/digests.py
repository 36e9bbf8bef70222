"""Digests of what a real client writes of tiny checkpoints: how they are made, and the file that holds them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import click

from tools.interop.client import Client

__all__ = ["KIND", "command", "digest", "written"]

KIND = "q8_0"
"""What clients quantise to."""

Digests = dict[str, str]
"""By file name."""


def digest(file: Path) -> str:
    """sha256 of a safetensors file: of its header as JSON, without `__metadata__` but in its order, and its data."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if header.pop("__metadata__", None) is None:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(header).encode() + content[end:]).hexdigest()


def written(
    client: Client,
    make: Callable[[Path], object],
    *,
    architecture: str | None,
    loader: str = "Plain",
    readable: Callable[[Path, Path], Path] | None = None,
) -> Digests:
    """What the client writes of a checkpoint.

    Args:
        client: that quantises.
        make: writes the checkpoint into a directory.
        architecture: the client's name of it; None if it finds out by itself.
        loader: the client's kind of loader.
        readable: makes of the residual one that can be read, under another path.

    Raises:
        ClientError: it writes nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder / "model")
        (folder / "out").mkdir()
        out = folder / "out" / f"{KIND}.uqff"
        file = client.write(folder / "model", out, architecture=architecture, dtype="F32", isq=KIND, kind=loader)
        residual = file.with_name("residual.safetensors")
        if readable is not None:
            residual = readable(residual, folder / residual.name)
        return {path.name: digest(path) for path in (file, residual)}


def command(
    of: Callable[[Client, str], Digests | None], names: Collection[str], targets: Mapping[str, Path]
) -> click.Command:
    """A command that lets a client write all digests again.

    Args:
        of: those of a name; None if the client writes nothing of it.
        names: of all checkpoints.
        targets: the file, by the client's version.
    """

    @click.command()
    @click.option("--client", "python", required=True, type=click.Path(path_type=Path), help="Its interpreter.")
    def main(python: Path) -> None:
        """Let the client write the digests again."""
        client = Client(python)
        version = client.about()["version"]
        if version not in targets:
            raise click.ClickException(f"expected mistralrs {' or '.join(targets)}, got {version}")
        digests = {name: of(client, name) for name in names}
        document = {"client": f"mistralrs {version}", "isq": KIND, "dtype": "F32", "digests": digests}
        targets[version].write_text(json.dumps(document, indent=1) + "\n")
        click.echo(f"{targets[version]}: {len(digests)} architectures")

    return main
