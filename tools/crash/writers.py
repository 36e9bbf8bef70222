"""What is killed: every writer, over what it replaces."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import uqff
from tools.tiny.models import TinyModel
from uqff.cli import main
from uqff.container import staging
from uqff.container.beside import TEMPORARY
from uqff.importance.matrix import Importance, InputSquares
from uqff.inspection.checksum import sums_text, write_sums

__all__ = ["WRITERS", "State", "Writer", "make_sources", "names"]

State = dict[str, str]
"""Digests by name: all that a reader sees. Empty where there is nothing."""

LAYERS = ("uqff.conversion.from_gguf", "uqff.conversion.to_gguf", "uqff.export.dequantize", "uqff.quantization.run")
MODELS = ("uqff.integrations.saving", "transformers.models.llama.modeling_llama")
EVAL = ("uqff.cli.eval", "uqff.evaluation.evaluate", "uqff.evaluation.picture", *MODELS)
CALIBRATE = ("uqff.cli.calibrate", "uqff.calibration.calibrate", *MODELS)
PLAN = ("uqff.cli.plan", "uqff.planning.plan", "uqff.planning.picture")
PAGE = ("uqff.cli.inspect", "uqff.inspection.page")

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
        between: whether something else may be there after a kill, which the next run sets right: each file old or new
            by itself (``"each"``), or nothing at the place of what is to be replaced (``"none"``).
        imports: modules that it needs, so that not each case has to import them.
    """

    name: str
    old: Callable[[Path, Path], object]
    write: Callable[[Path, Path], object]
    look: Callable[[Path], State]
    between: Literal["", "each", "none"] = ""
    imports: tuple[str, ...] = LAYERS

    def allows(self, found: State, old: State, new: State) -> bool:
        """Whether this may be there after a kill, or on a full disk."""
        if self.between == "each":
            return all(found.get(name) in (old.get(name), new.get(name)) for name in old | found | new)
        return found in (old, new) or (self.between == "none" and not found)


def make_sources(folder: Path) -> None:
    """What the writers read: a checkpoint, two sets of shards of the same shapes, models of both generations."""
    TINY.write(folder / "checkpoint")
    for kind in ("q8_0", "q4_0"):
        uqff.quantize_model(folder / "checkpoint", folder / kind, kind, shard_bytes=SHARD)
        uqff.quantize_model(folder / "checkpoint", folder / f"v0-{kind}", kind, version="0.2", shard_bytes=SHARD)
    uqff.convert(folder / "q4_0", folder / "m.gguf", to="gguf")
    (folder / "text").write_text(" ".join(f"t{3 + at * at % 50}" for at in range(64)))


def _save(kind: str, shard_bytes: int) -> Callable[[Path, Path], object]:
    def save(sources: Path, place: Path) -> object:
        with uqff.open(sources / kind) as file:
            return uqff.save(file, place / "m.uqff", shard_bytes=shard_bytes)

    return save


def _layers(place: Path) -> State:
    """The layers of a model as :func:`uqff.open` finds them."""
    try:
        with uqff.open(place) as file:
            return {key: _digest(b"".join(_bytes(file, key))) for key in file}
    except uqff.UqffError as error:
        if "no .uqff file" in error.problem:
            return {}
        raise


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(file: uqff.UqffFile, key: str) -> list[bytes]:
    places = [place for _, place in sorted(file.places(key).items())]
    return [place.path.read_bytes()[place.offset : place.offset + place.nbytes] for place in places]


def _files(name: str) -> Callable[[Path], State]:
    """The files of a directory, or one file."""

    def look(place: Path) -> State:
        path = place / name
        with contextlib.suppress(FileNotFoundError):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            return {each.name: _digest(each.read_bytes()) for each in files if not TEMPORARY.fullmatch(each.name)}
        return {}

    return look


def _quantize(*kinds: str, resume: bool = False, version: str = "1.2") -> Callable[[Path, Path], object]:
    def quantize(sources: Path, place: Path) -> object:
        return uqff.quantize_model(
            sources / "checkpoint",
            place / "out",
            kinds,
            version=version,
            shard_bytes=SHARD,
            force=True,
            measure=False,
            resume=resume,
        )

    return quantize


def _convert(kind: str) -> Callable[[Path, Path], object]:
    return lambda sources, place: uqff.convert(sources / kind, place / "m.gguf", to="gguf", force=True)


def _without_exchange(write: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
    """As on a system that cannot exchange two names."""

    def written(sources: Path, place: Path) -> object:
        vars(staging)["exchange"] = lambda one, other: False  # in a fork, which ends after it
        return write(sources, place)

    return written


def _sums(kind: str) -> Callable[[Path, Path], object]:
    def write(sources: Path, place: Path) -> None:
        found = uqff.checksum(sources / kind)
        write_sums(place / "SHA256SUMS", sums_text((each.name, each.sha256) for each in found.files or ()))

    return write


def _listed_model(sources: Path, place: Path) -> None:
    """A model whose report and list of checksums are about to change."""
    shutil.copytree(sources / "q8_0", place / "out")
    found = uqff.checksum(place / "out")
    write_sums(place / "out" / "SHA256SUMS", sums_text((each.name, each.sha256) for each in found.files or ()))


def _report(sources: Path, place: Path) -> object:
    return uqff.report(place / "out", write=True, base_model="an/other")


def _importance(chunk: int) -> Callable[[Path, Path], object]:
    def write(sources: Path, place: Path) -> None:
        squares = InputSquares(np.full((1, 64), chunk, np.float32), np.full(1, chunk, np.int64))
        for ending in (".gguf", ".imatrix", ".cimatrix"):
            Importance({"model.layers.0.mlp.up_proj": squares}, chunk=chunk).save(place / f"i{ending}")

    return write


def _command(*words: str) -> None:
    """A command of ``uqff``, of which an exit code other than 0 is an error."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if main(list(words), standalone_mode=False):
            raise OSError("the command failed")


def _calibrate(windows: int) -> Callable[[Path, Path], object]:
    def write(sources: Path, place: Path) -> None:
        out = ["-o", str(place / "i.gguf"), "--hessian", str(place / "h.safetensors"), "--quiet"]
        _command("calibrate", str(sources / "checkpoint"), *_text(sources, windows), *out)

    return write


def _eval(windows: int) -> Callable[[Path, Path], object]:
    def write(sources: Path, place: Path) -> None:
        out = ["--keep-logits", str(place / "logits"), "--picture", str(place / "p.svg"), "--json"]
        _command("eval", str(sources / "q8_0"), *_text(sources, windows), *out)

    return write


def _text(sources: Path, windows: int) -> list[str]:
    return ["--text", str(sources / "text"), "--context", "16", "--windows", str(windows)]


def _plan(bits: int) -> Callable[[Path, Path], object]:
    def write(sources: Path, place: Path) -> None:
        out = ["--out", str(place / "topology.yml"), "--picture", str(place / "p.svg"), "--json"]
        _command("plan", str(sources / "checkpoint"), "--bits", str(bits), "--types", "q4_0,q8_0", *out)

    return write


def _saved(kind: str, *, card: bool = True) -> Callable[[Path, Path], object]:
    """A model as ``transformers`` saves it; beside a file that is not its own, or where nothing was."""

    def write(sources: Path, place: Path) -> None:
        from uqff.integrations.saving import save_pretrained

        if card and not (place / "out").exists():
            (place / "out").mkdir()
            (place / "out" / "README.md").write_bytes(b"# A card")
        save_pretrained(uqff.load_model(sources / kind), place / "out")

    return write


def _layer_sums(kind: str) -> Callable[[Path, Path], object]:
    return lambda sources, place: _command(
        "checksum", str(sources / kind), "--layers", "--write", "--sums", str(place / "SHA256SUMS.layers")
    )


def _page(kind: str) -> Callable[[Path, Path], object]:
    return lambda sources, place: _command("inspect", str(sources / kind), "--html", str(place / "page.html"))


def _nothing(sources: Path, place: Path) -> None:
    """There was nothing before."""


WRITERS = (
    Writer("save, set over set", _save("q8_0", SHARD), _save("q4_0", SHARD // 4), _layers),
    Writer("save, set", _nothing, _save("q4_0", SHARD), _layers),
    Writer("save, file over file", _save("q8_0", 2**30), _save("q4_0", 2**30), _layers),
    Writer("save, 0.x, set over set", _save("v0-q8_0", SHARD), _save("v0-q4_0", SHARD // 4), _layers),
    Writer("quantize over a model", _quantize("q8_0"), _quantize("q4_0"), _files("out")),
    Writer("quantize", _nothing, _quantize("q4_0"), _files("out")),
    Writer("quantize, 0.x, over 1.x", _quantize("q8_0"), _quantize("q4_0", version="0.2"), _files("out")),
    Writer("quantize to two types over one", _quantize("q8_0"), _quantize("q4_0", "q8_0"), _files("out")),
    Writer("quantize --resume", _nothing, _quantize("q4_0", resume=True), _files("out")),
    Writer("quantize --resume over a model", _quantize("q8_0"), _quantize("q4_0", resume=True), _files("out")),
    Writer(
        "quantize over a model, no exchange",
        _quantize("q8_0"),
        _without_exchange(_quantize("q4_0")),
        _files("out"),
        between="none",
    ),
    Writer(
        "migrate over a model",
        _quantize("q8_0"),
        lambda sources, place: uqff.migrate(sources / "v0-q8_0", place / "out", shard_bytes=SHARD, force=True),
        _files("out"),
    ),
    Writer(
        "migrate back",
        _nothing,
        lambda sources, place: uqff.migrate(sources / "q4_0", place / "out", "0.2", shard_bytes=SHARD, force=True),
        _files("out"),
    ),
    Writer(
        "dequantize over a checkpoint",
        lambda sources, place: uqff.dequantize_model(sources / "q8_0", place / "out"),
        lambda sources, place: uqff.dequantize_model(sources / "q4_0", place / "out", shard_bytes=SHARD, force=True),
        _files("out"),
    ),
    Writer("convert to GGUF over a file", _convert("q8_0"), _convert("q4_0"), _files("m.gguf")),
    Writer(
        "convert from GGUF over a model",
        _quantize("q8_0"),
        lambda sources, place: uqff.convert(sources / "m.gguf", place / "out", to="uqff", force=True),
        _files("out"),
    ),
    Writer("checksum --write", _sums("q8_0"), _sums("q4_0"), _files("SHA256SUMS")),
    Writer("report --write", _listed_model, _report, _files("out"), between="each"),
    Writer("importance matrices", _importance(2), _importance(3), _files(""), between="each"),
    Writer("inspect --html", _page("q8_0"), _page("q4_0"), _files("page.html"), imports=PAGE),
    Writer(
        "checksum --layers --write",
        _layer_sums("q8_0"),
        _layer_sums("q4_0"),
        _files("SHA256SUMS.layers"),
        imports=("uqff.cli.checksum",),
    ),
    Writer("save_pretrained over a model", _saved("q8_0"), _saved("q4_0"), _files("out"), imports=MODELS),
    Writer("save_pretrained", _nothing, _saved("q4_0", card=False), _files("out"), imports=MODELS),
    Writer("calibrate --hessian", _calibrate(1), _calibrate(2), _files(""), "each", CALIBRATE),
    Writer("eval --keep-logits --picture", _eval(1), _eval(2), _files(""), "each", EVAL),
    Writer("plan --out --picture", _plan(8), _plan(5), _files(""), "each", PLAN),
)


def names(place: Path) -> list[str]:
    """All that lies in a directory, to see whether anything was left behind."""
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))
