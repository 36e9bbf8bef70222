r"""Checksums: of the files of a directory, as ``sha256sum`` writes them, and of layers, whatever file holds them.

A layer's digest covers what the layer is, and nothing of how it is stored: not the generation, the version, the shard,
the place in it, or whether the experts of a projection are one stack or a layer each.  So it tells that a model was
carried over unchanged.  The text that is hashed is made of the entries that 1.x has for the layer::

    layer      SHA-256 of   "uqff layer 1\n", then for each entry, sorted by suffix,
                            "weight.scales F32 [64,2]\n" and its bytes
    adjacent   the rows of Q and K that lie as in a GGUF file are hashed in the checkpoint's order; where they cannot
               change places exactly, as they are, and the first line is "uqff layer 1, rows of HEADS heads adjacent\n"
    experts    SHA-256 of   "uqff experts 1\n", then the digest of each expert, 32 bytes
    model      SHA-256 of   a line "<digest>  <path of the weight>\n" for each layer, sorted by path

Normative: ``docs/pages/reference/checksum.md``.  File lists follow GNU coreutils, ``src/cksum.c`` (``digest_check``,
``split_3``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uqff.codec.layer import Layer
from uqff.container.atomic import atomic_file
from uqff.container.beside import LAYER_SUMS_NAME, SUMS_NAME
from uqff.container.file import UqffFile, open_uqff
from uqff.container.shards import PathLike, resolve, select
from uqff.errors import FormatError, UqffError, located
from uqff.families.rows import can_reorder, reordered, reordered_bias
from uqff.inspection.digests import FileDigest, digest_files
from uqff.inspection.remote import Looked, looked_into
from uqff.limits import MAX_SUMS_BYTES
from uqff.models.architectures import LayerName
from uqff.models.layouts import WeightLayout, half_split_order, layout_beside
from uqff.models.modules import Module, config_beside, modules_of
from uqff.models.names import read_names
from uqff.progress import Progress, Steps
from uqff.schema.entries import BIAS, FORMAT, RawTensor
from uqff.simd.threads import num_threads

__all__ = [
    "LAYER_SUMS_NAME",
    "SUMS_NAME",
    "Check",
    "Checksum",
    "FileDigest",
    "LayerDigest",
    "ModelDigest",
    "check",
    "checksum",
    "checksum_document",
    "checksum_of",
    "digest_files",
    "digest_layer",
    "digest_model",
    "files_of",
    "read_sums",
    "sums_text",
    "write_sums",
]

LAYER_TAG: Final = b"uqff layer 1\n"
ADJACENT_TAG: Final = b"uqff layer 1, rows of %d heads adjacent\n"
EXPERTS_TAG: Final = b"uqff experts 1\n"


@dataclass(frozen=True)
class LayerDigest:
    """A layer of a model.

    Attributes:
        path: of the weight, as 1.x spells it.
        keys: of the file's layers that it is made of: one, or one for each expert.
        kinds: the types that occur in it.
        experts: the digest of each expert; empty if it is no stack that can be divided.
        sha256: its digest, in hexadecimal.
    """

    path: str
    keys: tuple[str, ...]
    kinds: tuple[str, ...]
    experts: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class ModelDigest:
    """All layers of a model, sorted by path.

    Attributes:
        layers: their digests.
        unnamed: why the layers have numbers in place of paths, which no other file has; None if they have paths.
    """

    layers: tuple[LayerDigest, ...]
    unnamed: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of the model: of the text that lists its layers."""
        return hashlib.sha256(encoded(sums_text((each.path, each.sha256) for each in self.layers))).hexdigest()


@dataclass(frozen=True)
class Check:
    """One line of a list: the digest that it states, and the one that was found; None if there is no such thing."""

    name: str
    expected: str
    got: str | None

    @property
    def matches(self) -> bool:
        """Whether the two are the same."""
        return self.expected == self.got


@dataclass(frozen=True)
class Checksum:
    """Digests of a model: of its files, or of its layers.

    Attributes:
        directory: of the model.
        files: the files; None if layers were asked for.
        model: the layers; None if files were asked for.
    """

    directory: Path
    files: tuple[FileDigest, ...] | None
    model: ModelDigest | None

    @property
    def digests(self) -> dict[str, str]:
        """The digests in hexadecimal, by the names of files or the paths of layers."""
        if self.model is not None:
            return {each.path: each.sha256 for each in self.model.layers}
        return {each.name: each.sha256 for each in self.files or ()}

    @property
    def text(self) -> str:
        """The list in the form of ``sha256sum``; below one of layers, the digest of the model where they have paths."""
        named = self.model is not None and self.model.unnamed is None
        return sums_text(self.digests.items()) + (f"# model {self.model.sha256}\n" if named and self.model else "")


def checksum(
    path: PathLike,
    *,
    layers: bool = False,
    names: PathLike | Sequence[LayerName] | None = None,
    isq: str | None = None,
    exclude: Collection[str] = (),
    progress: Progress | None = None,
) -> Checksum:
    """SHA-256 of the files of a model, or digests of its layers that neither generation nor sharding changes.

    Args:
        path: a model directory, or a ``.uqff`` file: its shards only. Of a model on the hub, the digests that the hub
            has of large files are taken; small files are read.
        layers: digests of layers in place of files.
        names: of 0.x layers by index, or a file of them; if not those of ``config.json``.
        isq: of a directory with several models, the type of the one that is meant.
        exclude: names of files that are left out.
        progress: called with the bytes that have been hashed and those that will have been.

    Raises:
        UqffError: a layer is not valid, or a set of shards has a gap.
        OSError: a file cannot be read.

    >>> "q4k-0.uqff" in uqff.checksum("model").digests
    True
    >>> len(uqff.checksum("model", layers=True).digests)
    29
    """
    if layers:
        known = read_names(names) if isinstance(names, (str, os.PathLike)) else names
        with open_uqff(path, isq) as file:
            return Checksum(file.paths[0].parent, None, digest_model(file, names=known, progress=progress))
    with looked_into(path, isq, structure=False) as looked:
        return looked.shown(checksum_of(looked, exclude=exclude, progress=progress))


def checksum_of(looked: Looked, *, exclude: Collection[str] = (), progress: Progress | None = None) -> Checksum:
    """The SHA-256 of the files of a model that is looked into; arguments as for :func:`checksum`."""
    directory, found = files_of(select(looked.path, looked.isq))
    wanted = [name for name in found if name not in exclude]
    return Checksum(directory, tuple(looked.digests(directory, wanted, progress)), None)


def digest_layer(layer: Layer) -> str:
    """The digest of one layer, in hexadecimal: the same in every file of every generation that holds it."""
    return _digest(layer)[0].hex()


def digest_model(
    file: UqffFile, *, names: Sequence[LayerName] | None = None, progress: Progress | None = None
) -> ModelDigest:
    """The digests of all layers of an open model.

    Layers are hashed on several threads and read once; nothing but small parts is copied.

    Args:
        file: of either generation. The paths of 0.x layers come from the ``config.json`` beside it.
        names: of 0.x layers in the order of their index, if not that.
        progress: called after each layer.

    Raises:
        UqffError: a layer is not valid, or what ``config.json`` says of their rows.
    """
    unnamed = None
    config: Mapping[str, Any] | None = None
    try:
        if file.generation == "0.x" and names is None:
            config = config_beside(file)
            unnamed = "no config.json beside the file" if config is None else None
        modules = modules_of(file, config, names)
    except UqffError as error:
        unnamed = str(error)
        modules = modules_of(file, None)
    layout = WeightLayout() if unnamed is not None else layout_beside(file)
    sizes = [sum(place.nbytes for key in module.keys for place in file.places(key).values()) for module in modules]
    steps = Steps(progress, "checksum", len(modules), sum(sizes), "bytes")
    digests = []
    with ThreadPoolExecutor(num_threads(), thread_name_prefix="uqff-checksum") as pool:
        try:
            for digest, size in zip(
                pool.map(lambda module: _digest_module(file, module, layout), modules), sizes, strict=True
            ):
                digests.append(digest)
                steps.add(digest.path, size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return ModelDigest(tuple(sorted(digests, key=lambda each: encoded(each.path))), unnamed)


def _digest_module(file: UqffFile, module: Module, layout: WeightLayout) -> LayerDigest:
    kinds: dict[str, None] = {}
    digests: list[bytes] = []
    experts: list[bytes] = []
    for key in module.keys:
        record, fields = file.fields(key)
        layer = Layer.of_fields(record, fields)
        kinds[layer.weight.kind] = None
        if len(layer.weight.shape) > 2:
            digest, experts = _digest(layer)
        else:
            digest = _digest_matrix(layer, layout.heads_of(module.path))
        digests.append(digest)
        file.release(key)
    if len(module.keys) > 1:
        experts, digests = digests, [_join(digests)]
    return LayerDigest(
        module.path, module.keys, tuple(sorted(kinds)), tuple(digest.hex() for digest in experts), digests[0].hex()
    )


def _digest_matrix(layer: Layer, heads: int | None) -> bytes:
    """The digest of a layer that is no stack, with its rows as a checkpoint has them."""
    if heads is None:
        return _hash(_entries(layer))
    weight, bias = layer.weight, layer.bias_part
    if not can_reorder(weight):
        return _hash(_entries(layer), ADJACENT_TAG % heads)
    order = half_split_order(weight.shape[0], heads)
    moved = Layer(reordered(weight, order), None if bias is None else reordered_bias(bias, order))
    return _hash(_entries(moved))


def _digest(layer: Layer) -> tuple[bytes, list[bytes]]:
    """The digest of a layer, and those of its experts if it has some."""
    weight = layer.weight
    if len(weight.shape) > 2 and weight.has_whole_experts:
        experts = [_digest(expert)[0] for expert in layer.unstack()]
        return _join(experts), experts
    return _hash(_entries(layer)), []


def _entries(layer: Layer) -> dict[str, RawTensor]:
    """What 1.x would store of a layer, by suffix, in whatever version it may be."""
    weight, bias = layer.weight, layer.bias_part
    entries = {FORMAT: RawTensor("U8", (), bytes([weight.family])), **weight.ENTRIES.build(weight.build())}
    if bias is not None:
        entries[BIAS] = RawTensor(bias.dtype.safetensors, bias.shape, bias.payload)
    return entries


def _hash(entries: Mapping[str, RawTensor], tag: bytes = LAYER_TAG) -> bytes:
    digest = hashlib.sha256(tag)
    for suffix in sorted(entries):
        dtype, shape, data = entries[suffix]
        digest.update(f"{suffix} {dtype} [{','.join(map(str, shape))}]\n".encode("ascii"))
        digest.update(data)
    return digest.digest()


def _join(experts: Iterable[bytes]) -> bytes:
    return hashlib.sha256(EXPERTS_TAG + b"".join(experts)).digest()


def files_of(path: PathLike) -> tuple[Path, list[str]]:
    """The directory that a checksum of ``path`` is about, and the names of the files in it.

    Args:
        path: a directory: all its files but hidden ones and the lists themselves; or a ``.uqff`` file, or
            ``DIR:TYPE``: its shards.

    Raises:
        ShardError: a gap in a set of shards.
        FormatError: a pipe, a device or a link that leads nowhere stands among the files.
        FileNotFoundError: no such file.
    """
    path = select(path)
    if not path.is_dir():
        paths, _ = resolve(path)
        return paths[0].parent, [each.name for each in paths]
    with os.scandir(path) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    found = [entry for entry in found if entry.name not in (SUMS_NAME, LAYER_SUMS_NAME)]
    found.sort(key=lambda entry: encoded(entry.name))
    for entry in found:
        if not entry.is_file():  # a list without it would say that all is there
            raise FormatError("not a regular file", file=entry.path)
    return path, [entry.name for entry in found]


def encoded(text: str) -> bytes:
    """A name as bytes; a file name that is no text keeps those that it has."""
    return text.encode("utf-8", "surrogateescape")


def sums_text(digests: Iterable[tuple[str, str]]) -> str:
    """A list as ``sha256sum`` writes it: ``<digest>  <name>``, a line each.

    Args:
        digests: name and digest. A name with a line break or a backslash is escaped, and its line begins with one.
    """
    lines = []
    for name, digest in digests:
        shown = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if shown == name else chr(92)}{digest}  {shown}\n")
    return "".join(lines)


def write_sums(path: PathLike, text: str) -> None:
    """Write a list; it appears whole or not at all."""
    with atomic_file(Path(path)) as file:
        file.write(encoded(text))


def read_sums(path: PathLike) -> dict[str, str]:
    """The digests of a list by name.

    Raises:
        FormatError: the list is too long, or a line is none; its number is named.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_SUMS_BYTES + 1)
    if len(raw) > MAX_SUMS_BYTES:
        raise FormatError("list of checksums is too long", file=str(path), expected=f"at most {MAX_SUMS_BYTES} bytes")
    sums: dict[str, str] = {}
    for number, line in enumerate(raw.decode("utf-8", "surrogateescape").split("\n"), 1):
        text = line.removesuffix("\r")
        if not text or text.startswith("#"):
            continue
        with located(file=path, prefix=f"line {number}"):
            name, digest = _parse_line(text)
            if sums.setdefault(name, digest) != digest:
                raise FormatError("name occurs twice with two digests", got=name)
    return sums


def _parse_line(line: str) -> tuple[str, str]:
    is_escaped = line.startswith("\\")
    digest, name = line[is_escaped:][:64].lower(), line[is_escaped:][64:]
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or name[:2] not in ("  ", " *") or not name[2:]:
        raise FormatError("not a line of checksums", expected="64 hexadecimal digits, two spaces, a name", got=line)
    return (_unescaped(name[2:]) if is_escaped else name[2:]), digest


def _unescaped(name: str) -> str:
    meanings = {"\\": "\\", "n": "\n", "r": "\r"}
    made, letters = [], iter(name)
    for letter in letters:
        if letter == "\\":
            letter = meanings.get(next(letters, ""), "")
            if not letter:
                raise FormatError("unknown escape in a name", expected=r"\\, \n or \r", got=name)
        made.append(letter)
    return "".join(made)


def check(stated: Mapping[str, str], found: Mapping[str, str]) -> list[Check]:
    """Compare a list with what is there; what the list does not name does not count."""
    return [Check(name, expected, found.get(name)) for name, expected in stated.items()]


def checksum_document(files: Sequence[FileDigest] | None, model: ModelDigest | None) -> dict[str, Any]:
    """Digests as JSON values; what was not asked for is left out."""
    document: dict[str, Any] = {"schema": 1}
    if files is not None:
        document["files"] = [{"name": each.name, "bytes": each.nbytes, "sha256": each.sha256} for each in files]
    if model is not None:
        document["model"] = model.sha256 if model.unnamed is None else None
        document["unnamed"] = model.unnamed
        document["layers"] = [
            {
                "path": each.path,
                "keys": list(each.keys),
                "types": list(each.kinds),
                "sha256": each.sha256,
                "experts": list(each.experts),
            }
            for each in model.layers
        ]
    return document
