"""What is killed: every writer, over what it replaces."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uqff
from tools.tiny.models import TinyModel

__all__ = ["WRITERS", "Writer", "make_sources"]

State = dict[str, str]
"""Digests by name: all that a reader sees. Empty where there is nothing."""

TINY = TinyModel(hidden_size=64, intermediate_size=64, heads=2)
SHARD = 20_000


@dataclass(frozen=True)
class Writer:
    """Something that writes.

    Attributes:
        name: what it is called.
        old: makes what is there before, in a directory, of the sources.
        write: replaces it.
        look: what a reader sees of it.
    """

    name: str
    old: Callable[[Path, Path], object]
    write: Callable[[Path, Path], object]
    look: Callable[[Path], State]


def make_sources(folder: Path) -> None:
    """What the writers read: a checkpoint, two sets of shards of the same shapes, models of both generations."""
    TINY.write(folder / "checkpoint")
    for kind in ("q8_0", "q4_0"):
        uqff.quantize_model(folder / "checkpoint", folder / kind, kind, shard_bytes=SHARD)
    uqff.quantize_model(folder / "checkpoint", folder / "v0", "q8_0", version="0.2")


def _save(kind: str, shard_bytes: int) -> Callable[[Path, Path], object]:
    def save(sources: Path, place: Path) -> object:
        with uqff.open(sources / kind) as file:
            return uqff.save(file, place / "m.uqff", shard_bytes=shard_bytes)

    return save


def _layers(place: Path) -> State:
    """The layers of a model as :func:`uqff.open` finds them."""
    try:
        with uqff.open(place) as file:
            return {key: hashlib.sha256(b"".join(_bytes(file, key))).hexdigest() for key in file}
    except uqff.UqffError as error:
        if "no .uqff file" in error.problem:
            return {}
        raise


def _bytes(file: uqff.UqffFile, key: str) -> list[bytes]:
    return [bytes(entry.data) for _, entry in sorted(file.entries(key).items())]


def _files(name: str) -> Callable[[Path], State]:
    """The files of a directory, or one file."""

    def look(place: Path) -> State:
        path = place / name
        with contextlib.suppress(FileNotFoundError):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
        return {}

    return look


def _quantize(kind: str, *, resume: bool = False) -> Callable[[Path, Path], object]:
    def quantize(sources: Path, place: Path) -> object:
        return uqff.quantize_model(
            sources / "checkpoint", place / "out", kind, shard_bytes=SHARD, force=True, measure=False, resume=resume
        )

    return quantize


def _convert(kind: str) -> Callable[[Path, Path], object]:
    return lambda sources, place: uqff.convert(sources / kind, place / "m.gguf", to="gguf", force=True)


def _sums(kind: str) -> Callable[[Path, Path], object]:
    from uqff.inspection.checksum import sums_text, write_sums

    def write(sources: Path, place: Path) -> None:
        found = uqff.checksum(sources / kind)
        write_sums(place / "SHA256SUMS", sums_text((each.name, each.sha256) for each in found.files or ()))

    return write


def _nothing(sources: Path, place: Path) -> None:
    """There was nothing before."""


WRITERS = (
    Writer("save, set over set", _save("q8_0", SHARD), _save("q4_0", SHARD // 4), _layers),
    Writer("save, set", _nothing, _save("q4_0", SHARD), _layers),
    Writer("save, file over file", _save("q8_0", 2**30), _save("q4_0", 2**30), _layers),
    Writer("quantize over a model", _quantize("q8_0"), _quantize("q4_0"), _files("out")),
    Writer("quantize", _nothing, _quantize("q4_0"), _files("out")),
    Writer("quantize --resume over a model", _quantize("q8_0"), _quantize("q4_0", resume=True), _files("out")),
    Writer(
        "migrate over a model",
        _quantize("q8_0"),
        lambda sources, place: uqff.migrate(sources / "v0", place / "out", force=True),
        _files("out"),
    ),
    Writer(
        "dequantize over a checkpoint",
        lambda sources, place: uqff.dequantize_model(sources / "q8_0", place / "out"),
        lambda sources, place: uqff.dequantize_model(sources / "q4_0", place / "out", force=True),
        _files("out"),
    ),
    Writer("convert to GGUF over a file", _convert("q8_0"), _convert("q4_0"), _files("m.gguf")),
    Writer("checksum --write", _sums("q8_0"), _sums("q4_0"), _files("SHA256SUMS")),
)


def names(place: Path) -> list[str]:
    """All that lies in a directory, to see whether anything was left behind."""
    return sorted(os.listdir(place))
