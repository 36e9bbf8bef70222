"""Looking into a model on the hub without fetching its weights: headers and small fields are read by ranges.

What was read is written at its place into files of the true lengths in a temporary directory, and all else in them is
a hole, which takes no room.  So everything that looks at structure works on such a directory as on any other, with all
its checks; what looks at weights must not, but for those that were read in full.  Which bytes structure needs::

    header          8 + n bytes of each file
    1.x             the entries of a few bytes: versions, formats, shapes, bits
    0.x             the fields of each blob but its payloads; where the next one lies is known when the one before is
                    read, so blobs are parsed again and again until the parser has seen nothing but what was read
    documents       config.json and uqff_report.json as a whole
    checkpoints     8 + n bytes of each file of weights, and the index as a whole
    GGUF            metadata and the list of tensors, whose end is known when it is read: twice as much is read until
                    it is; and the few tensors that are numbers of the configuration
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from uqff.checkpoints.gguf.files import is_gguf
from uqff.consolidated import PARAMS_NAME
from uqff.container.beside import CONFIG_NAME, LAYER_SUMS_NAME, SUMS_NAME
from uqff.container.closing import Closing
from uqff.container.file import RESIDUAL_NAME, UqffFile, open_uqff
from uqff.container.framing import LENGTH_BYTES
from uqff.container.mapped import MappedFile
from uqff.container.report import REPORT_NAME
from uqff.container.shards import PathLike, at_hand, models_in, resolve, select
from uqff.errors import HubError, UqffError
from uqff.gguf.reader import head_end, open_gguf
from uqff.hub.client import RemoteFolder, Unreachable, Wanted, imported
from uqff.hub.fetch import INDEX, checkpoint_gguf, checkpoint_weights, projectors
from uqff.hub.names import NO_PROJECTOR, HubName, hub_name
from uqff.inspection.digests import FileDigest, digest_files
from uqff.inspection.spans import Spans
from uqff.limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_REPORT_BYTES, MAX_SUMS_BYTES
from uqff.progress import Progress, Steps
from uqff.schema.bricks import FieldTrace

__all__ = ["Looked", "checkpoint_looked_into", "looked_into"]

FIRST: Final = 1 << 17
"""Bytes that are read of a file before the length of its header is known."""

SMALL: Final = 4096
"""Bytes of an entry that is read without being asked what it is."""

PROBE: Final = 512
"""Bytes of a blob that are read together: the fields between two payloads take some sixty."""

ROTARY: Final = "rope_"
"""How tensors of a GGUF file begin that are numbers of a configuration."""

GAP: Final = 4096
"""Two ranges that are no farther apart are read as one."""

MAX_PLAIN_BYTES: Final = 100_000_000
"""Longest file that is read to be hashed: the hub's own bound for those that are not in its store of large files."""

PIECE: Final = 1 << 23
"""Bytes of the longest range that is asked for."""

DOCUMENTS: Final = {
    CONFIG_NAME: MAX_CONFIG_BYTES,
    PARAMS_NAME: MAX_CONFIG_BYTES,
    REPORT_NAME: MAX_REPORT_BYTES,
    SUMS_NAME: MAX_SUMS_BYTES,
    LAYER_SUMS_NAME: MAX_SUMS_BYTES,
    INDEX: MAX_HEADER_BYTES,
}
"""What is read whole, and the longest that it may be; of a longer one, nothing: its reader refuses it unread."""

_T = TypeVar("_T")


class Looked:
    """A model that can be looked into: one on this machine as it is.

    Attributes:
        path: what to open.
        isq: of several models there, the type of the one to open; None once one has been selected.
        remote: whether its weights have not been read.
    """

    remote = False

    def __init__(self, path: PathLike, isq: str | None = None) -> None:
        self.path = path
        self.isq = isq

    def read_layer(self, key: str, *, limit: int = 0) -> None:
        """Have the bytes of a layer at hand: of each field the first ``limit``, or all if that is 0."""

    def digests(self, directory: Path, names: Sequence[str], progress: Progress | None = None) -> list[FileDigest]:
        """The SHA-256 of files of a directory."""
        return digest_files(directory, names, progress=progress)

    def shown(self, found: _T) -> _T:
        """What was found, with the names of files as the caller knows them."""
        return found


class Skeleton(Looked, Closing):
    """A model on the hub: its structure, in a temporary directory."""

    remote = True

    def __init__(self, name: HubName, *, structure: bool = True) -> None:
        """Read the structure, or nothing but which files there are, and the documents.

        Raises:
            HubError: the hub did not give it.
            ShardError: no model of the type that was asked for, or several.
        """
        self._folder = RemoteFolder(name)
        self._read: dict[str, Spans] = {}
        self._documents: set[str] = set()
        self._directory = tempfile.TemporaryDirectory(prefix="uqff-hub-", ignore_cleanup_errors=True)
        self._home = Path(self._directory.name).resolve()
        self._named = str(HubName(name.repo, name.revision, name.folder))
        super().__init__(self._home)
        try:
            with self.renaming():
                self._make_files()
                self._choose(name)
                if structure:
                    self._read_structure()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the directory."""
        self._directory.cleanup()

    def read_layer(self, key: str, *, limit: int = 0) -> None:
        """Read the bytes of a layer by ranges: of each field the first ``limit``, or all if that is 0."""
        with open_uqff(self.path) as file:
            if not limit:
                spans = [(place.path, place.offset, place.offset + place.nbytes) for place in file.places(key).values()]
            else:
                spans = [(path, at, at + min(field.size, limit)) for path, at, field in _fields(file, key)[0]]
            wanted = [gap for path, begin, end in spans for gap in self._gaps(path.name, begin, end)]
        self._fetch(wanted)

    def shown(self, found: _T) -> _T:
        """What was found, with the names that files have on the hub."""
        made: _T = _renamed(found, str(self._home), self._named)
        return made

    def digests(self, directory: Path, names: Sequence[str], progress: Progress | None = None) -> list[FileDigest]:
        """The SHA-256 of files: as the hub states it of those in its store of large files; others are read."""
        files = {name: self._folder.files[name] for name in names}
        steps = Steps(progress, "checksum", len(names), sum(file.nbytes for file in files.values()), "bytes")
        found = []
        for name, file in files.items():
            found.append(FileDigest(name, file.nbytes, file.sha256 or hashlib.sha256(self._whole(name)).hexdigest()))
            steps.add(name, file.nbytes)
        return found

    def _whole(self, name: str) -> bytes:
        """A file that is not in the store of large files; documents have been read."""
        return (self._home / name).read_bytes() if name in self._documents else self._folder.read(name, MAX_PLAIN_BYTES)

    @contextlib.contextmanager
    def renaming(self) -> Iterator[None]:
        """Errors from within the block name files as the hub does."""
        try:
            yield
        except UqffError as error:
            _renamed(error, str(self._home), self._named)
            raise
        except OSError as error:
            error.args = tuple(_renamed(each, str(self._home), self._named) for each in error.args)
            if isinstance(error.filename, str):
                error.filename = _renamed(error.filename, str(self._home), self._named)
            raise

    def _make_files(self) -> None:
        """Files of the true lengths; documents as they are."""
        for name, file in self._folder.files.items():
            is_document = name in DOCUMENTS and file.nbytes <= DOCUMENTS[name]
            with open(self._home / name, "xb") as made:
                if is_document:
                    made.write(self._folder.read(name, DOCUMENTS[name]))
                    self._documents.add(name)
                else:
                    make_hole(made, file.nbytes)

    def _choose(self, name: HubName) -> None:
        """Of several models the one that is meant."""
        if name.file is not None:
            self.path = self._home / name.file
            if name.file not in self._folder.files:
                raise HubError("no such file in the repository", file=str(name))
        self.path = select(self.path, name.kind)

    def _read_structure(self) -> None:
        chosen = Path(self.path)
        starts = list(models_in(chosen).values()) if chosen.is_dir() else [chosen]
        models = []
        for start in starts:
            with contextlib.suppress(UqffError):  # whoever opens it says so
                models.append(resolve(start))
        paths = [path for shards, _ in models for path in shards]
        residual = self._home / RESIDUAL_NAME
        self._read_headers([*paths, residual] if residual.is_file() else paths)
        self._fetch([gap for path in paths for gap in self._small_entries(path)])
        for shards, complete in models:
            while self._read_fields(shards, complete):
                pass

    def _read_headers(self, paths: Sequence[Path]) -> None:
        sizes = {path.name: path.stat().st_size for path in paths}
        self._fetch([Wanted(name, 0, min(size, FIRST)) for name, size in sizes.items()])
        more = []
        for path in paths:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            end = LENGTH_BYTES + length
            if length <= MAX_HEADER_BYTES and end <= sizes[path.name]:
                more += self._gaps(path.name, 0, end)
        self._fetch(more)

    def _small_entries(self, path: Path) -> Iterator[Wanted]:
        try:
            file = MappedFile(path)
        except UqffError:  # whoever opens it says so
            return
        with contextlib.closing(file):
            for entry in file.header.entries.values():
                if entry.end - entry.begin <= SMALL:
                    yield from self._gaps(path.name, entry.begin, entry.end)

    def _read_fields(self, shards: list[Path], complete: bool) -> bool:
        """Read, of each layer, what a parser looked at without its having been read; tells whether there was any."""
        try:
            file = UqffFile(shards, complete=complete)
        except UqffError:  # whoever opens it says so
            return False
        with file:
            wanted = [gap for key in file for gap in self._unread(file, key)]
        self._fetch(wanted)
        return bool(wanted)

    def _unread(self, file: UqffFile, key: str) -> list[Wanted]:
        """The range that holds the first field which has not been read: what follows it means nothing yet."""
        fields, is_broken = _fields(file, key)
        for path, at, field in fields:
            if not isinstance(field.value, memoryview) and self._gaps(path.name, at, at + field.size):
                return self._gaps(path.name, at, max(at + field.size, min(at + PROBE, _end_of(file, key))))
        if is_broken and file.generation == "0.x":  # by the next field, unless its bytes were none
            place = file.place(key)
            at = max([place.offset, *(at + field.size for _, at, field in fields)])
            return self._gaps(place.path.name, at, min(at + PROBE, place.offset + place.nbytes))
        return []

    def _gaps(self, name: str, begin: int, end: int) -> list[Wanted]:
        """What of a range has not been read."""
        known = self._read.get(name)
        spans = [(begin, end)] if known is None else known.gaps(begin, end)
        return [Wanted(name, *span) for span in spans if span[0] < span[1]]

    def _fetch(self, wanted: Iterable[Wanted]) -> None:
        """Read ranges, and write them where they belong."""
        for span, data in self._folder.read_ranges(list(_pieces(_joined(wanted)))):
            with open(self._home / span.path, "r+b") as file:
                file.seek(span.begin)
                file.write(data)
            self._read.setdefault(span.path, Spans()).add(span.begin, span.end)


class CheckpointSkeleton(Skeleton):
    """A checkpoint on the hub: the names, shapes and types of its tensors, in a temporary directory.

    Attributes:
        is_one: whether there are weights, in safetensors files or a GGUF file.
    """

    is_one = False

    def __init__(self, name: HubName, mmproj: PathLike | None = None) -> None:
        """Read the headers.

        Args:
            name: of the checkpoint.
            mmproj: of a GGUF file, see :func:`uqff.hub.fetch.fetch`.

        Raises:
            UqffError: see :class:`Skeleton`.
        """
        self._mmproj = mmproj
        super().__init__(name)

    def _choose(self, name: HubName) -> None:
        """The whole directory is one."""

    def _read_structure(self) -> None:
        weights, parts = checkpoint_weights(self._folder), checkpoint_gguf(self._folder)
        self.is_one = bool(weights or parts)
        self._read_headers([self._home / each for each in weights])
        if parts:
            self.path = self._home / parts[0]
            self._read_gguf([*parts, *projectors(self._folder, self._mmproj)])

    def _read_gguf(self, parts: Sequence[str]) -> None:
        for part in parts:
            self._read_head(part)
        spans: list[tuple[str, int, int]] = []
        with contextlib.suppress(UqffError), open_gguf(self.path) as file:  # whoever opens it says so
            found = [each for name, each in file.items() if name.startswith(ROTARY) and each.nbytes <= PIECE]
            spans = [(each.file.path.name, each.begin, each.begin + each.nbytes) for each in found]
        self._fetch([gap for span in spans for gap in self._gaps(*span)])

    def _read_head(self, name: str) -> None:
        """Read of a GGUF file until its list of tensors ends, or until more does not help."""
        size, length, problem = self._folder.files[name].nbytes, FIRST, ""
        while True:
            known = min(length, size)
            self._fetch(self._gaps(name, 0, known))
            with open(self._home / name, "rb") as file:
                data = memoryview(file.read(known))
            try:
                head_end(data)
            except UqffError as error:
                if known == size or length >= MAX_HEADER_BYTES or str(error) == problem:
                    return  # whoever opens it says so
                problem = str(error)
            else:
                return
            length *= 2


def make_hole(file: BinaryIO, nbytes: int) -> None:
    """Give a new file its length, of which nothing is there yet.

    Raises:
        HubError: the file system has no files of that length.
    """
    try:
        file.truncate(nbytes)
    except (OSError, OverflowError):
        raise HubError("no file of that length is possible here", file=file.name, got=nbytes) from None


def _joined(wanted: Iterable[Wanted]) -> Iterator[Wanted]:
    """Ranges in order, those near to each other as one."""
    last: Wanted | None = None
    for span in sorted(wanted):
        if last is not None and span.path == last.path and span.begin <= last.end + GAP:
            last = last._replace(end=max(last.end, span.end))
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _pieces(wanted: Iterable[Wanted]) -> Iterator[Wanted]:
    for path, begin, end in wanted:
        for at in range(begin, end, PIECE):
            yield Wanted(path, at, min(at + PIECE, end))


def _fields(file: UqffFile, key: str) -> tuple[list[tuple[Path, int, FieldTrace]], bool]:
    """The fields of a layer with their files and places in them, as far as they can be read; whether one is broken."""
    trace: list[FieldTrace] = []
    is_broken = False
    try:
        file.fields(key, trace=trace)
    except UqffError:
        is_broken = True
    places = file.places(key)
    if "" in places:
        return [(places[""].path, places[""].offset + field.offset, field) for field in trace], is_broken
    return [(places[field.path].path, field.offset, field) for field in trace], is_broken


def _end_of(file: UqffFile, key: str) -> int:
    place = file.place(key)
    return place.offset + place.nbytes


def _renamed(found: Any, old: str, new: str) -> Any:
    """A result with another name for a directory, wherever one of its texts or paths has it."""
    if isinstance(found, str):
        return found.replace(old, new) if old in found else found
    if isinstance(found, Path):
        return Path(str(found).replace(old, new)) if old in str(found) else found
    if isinstance(found, UqffError):  # in place: it may be on its way already
        for name in ("problem", "file", "expected", "got"):
            setattr(found, name, _renamed(getattr(found, name), old, new))
        return found
    if isinstance(found, tuple) and type(found) is not tuple:
        return found  # a named one: numbers and classes
    if isinstance(found, (tuple, list)):
        made = [_renamed(each, old, new) for each in found]
        return found if all(a is b for a, b in zip(made, found, strict=True)) else type(found)(made)
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        values = {each.name: getattr(found, each.name) for each in dataclasses.fields(found) if each.init}
        changed = {name: _renamed(value, old, new) for name, value in values.items()}
        is_same = all(changed[name] is value for name, value in values.items())
        return found if is_same else dataclasses.replace(found, **changed)
    return found


@contextlib.contextmanager
def looked_into(path: PathLike, isq: str | None = None, *, structure: bool = True) -> Iterator[Looked]:
    """A model that is to be looked into, on this machine or on the hub; there, its structure is read and no weight.

    Args:
        path: what :func:`uqff.open` takes, or the name of a repository.
        isq: of several models, the type of the one that is meant.
        structure: whether the structure is wanted, not only the names and digests of files.

    Raises:
        UqffError: the hub did not give it, or there is no such model; and whatever the block raises, with the names
            that files have on the hub.
    """
    name = hub_name(path)
    if name is None or imported(str(name)).constants.HF_HUB_OFFLINE:  # then whoever opens it takes it from the cache
        yield Looked(path, isq)
        return
    with Skeleton(name.of(isq), structure=structure) as skeleton, skeleton.renaming():
        yield skeleton


@contextlib.contextmanager
def gguf_looked_into(path: PathLike, isq: str | None = None) -> Iterator[Looked | None]:
    """A GGUF file that is to be looked into: of one on the hub, its head is read, and that of the other parts of a
    split one.

    Args:
        path: of the file, or the name of a repository.
        isq: of several files there, the type of the one that is meant.

    Yields:
        It; None if the path means something else.

    Raises:
        UqffError: the hub did not give it, or there are several; and whatever the block raises, with the names that
            files have on the hub.
    """
    name = hub_name(path)
    if name is None:
        yield Looked(path) if is_gguf(path) else None
    elif imported(str(name)).constants.HF_HUB_OFFLINE:
        found = at_hand(path, isq)
        yield Looked(found) if is_gguf(found) else None
    else:
        with CheckpointSkeleton(name.of(isq), NO_PROJECTOR) as skeleton, skeleton.renaming():
            yield skeleton if is_gguf(skeleton.path) else None


@contextlib.contextmanager
def checkpoint_looked_into(
    path: PathLike, *, weights: bool = False, mmproj: PathLike | None = None
) -> Iterator[Looked]:
    """A checkpoint whose tensors are to be listed: of one on the hub, headers are read and no weight.

    Args:
        path: what :func:`uqff.open_checkpoint` takes.
        weights: whether weights will be read, too; then all is left to it.
        mmproj: see there, too.

    Raises:
        UqffError: the hub did not give it; and whatever the block raises, with the names that files have on the hub.
    """
    name = None if weights else hub_name(path)
    try:
        skeleton = None if name is None else CheckpointSkeleton(name, mmproj)
    except Unreachable:  # the cache may have it
        skeleton = None
    if skeleton is None:
        yield Looked(path)
        return
    with skeleton, skeleton.renaming():
        yield skeleton if skeleton.is_one else Looked(path)
