"""A Hugging Face checkpoint: ``config.json`` and weights in safetensors files, one or several with an index.

::

    config.json                            or   params.json and consolidated.safetensors, of Voxtral
    model.safetensors                      or   model.safetensors.index.json
                                                {"metadata": ..., "weight_map": {tensor: file name, ...}}
                                                model-00001-of-00002.safetensors, ...

Nothing but headers is read on opening; tensors are views of mapped files.  File names in the index must be plain names
of siblings, so that an index cannot point a reader elsewhere.

Authority: transformers, ``modeling_utils.py`` (``_get_resolved_checkpoint_files``), ``utils/hub.py``
(``get_checkpoint_shard_files``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uqff.codes import LOADED_DTYPES, DType
from uqff.consolidated import CONSOLIDATED_NAME, PARAMS_NAME, is_read_as_consolidated
from uqff.container.beside import INDEX_NAME
from uqff.container.closing import Closing
from uqff.container.document import is_present, read_json, write_json
from uqff.container.mapped import ListedFile, MappedFile, TensorMap
from uqff.container.shards import PathLike
from uqff.errors import FormatError, ShardError
from uqff.hub.fetch import fetch, no_models
from uqff.hub.names import hub_name
from uqff.limits import MAX_HEADER_BYTES, MAX_SHARDS
from uqff.models.assets import CONFIG_NAME, companions_of, copy_companions
from uqff.models.config import read_config
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    import torch
__all__ = ["CONFIG_NAME", "TensorFiles", "open_tensors"]

SINGLE_NAME: Final = "model.safetensors"


class TensorFiles(Mapping[str, "torch.Tensor"], Closing):
    """The files of a checkpoint: names to tensors as they are stored, views of the files. Made by :func:`open_tensors`.

    What the tensors mean, which of them make up a layer, is for :class:`~uqff.checkpoints.checkpoint.Checkpoint`.

    Attributes:
        path: the directory.
        config: of ``config.json``, see :mod:`uqff.models.config`; empty if there is none.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], files: list[MappedFile], config_path: Path | None = None
    ) -> None:
        self.path = path
        self.config = config
        self._config_path = path / CONFIG_NAME if config_path is None else config_path
        self._files = files
        self._tensors = TensorMap(files)
        self._file_of = {name: file for file in files for name in file.header.entries}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files themselves."""
        return tuple(self._files)

    @property
    def listed(self) -> tuple[MappedFile | ListedFile, ...]:
        """The files and what lies in each, of whatever format they are."""
        return self.files

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor; a view of the file, which does not import torch."""
        return self._tensors.raw(name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; the directory, if none does."""
        return self._file_of[name].path if name in self._file_of else self.path

    @property
    def computed(self) -> frozenset[str]:
        """Tensors whose numbers are computed from codes, in float32: not rounded to a load dtype. Here, none."""
        return frozenset()

    def floats(self, name: str, expert: int | None = None) -> Floats:
        """A tensor of F32, F16 or BF16, or one of its first dimension; a view of the file. Does not import torch."""
        whole = Floats.of_bytes(self.raw(name), LOADED_DTYPES[self.dtype(name)], self.shape(name))
        return whole if expert is None else whole[expert]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without making it."""
        return self._tensors.entry(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it, without making it."""
        return self._tensors.entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        entry = self._tensors.entry(name)
        return entry.end - entry.begin

    def stamps(self) -> list[list[str | int]]:
        """Name, size and time of the last change (nanoseconds) of each file: what tells that it is still the same."""
        status = [(file.path, os.stat(file.path)) for file in self._files]
        return [[path.name, each.st_size, each.st_mtime_ns] for path, each in status]

    def fetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read a tensor's bytes, all or ``start`` to ``stop``, from the disk in the background."""
        self._advise(name, "WILLNEED", start, stop)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give back the memory of a tensor's bytes, all or ``start`` to ``stop``; a later look reads them again."""
        self._advise(name, "DONTNEED", start, stop)

    def _advise(self, name: str, advice: str, start: int = 0, stop: int | None = None) -> None:
        entry = self._tensors.entry(name)
        stop = entry.end - entry.begin if stop is None else stop
        self._file_of[name].advise(entry.begin + start, entry.begin + stop, advice)

    @property
    def config_path(self) -> Path:
        """Where the configuration stands, if it does; that of some models in ``params.json``."""
        return self._config_path

    def check_companions(self) -> None:
        """Make sure of what :meth:`write_companions` will write, before any work.

        Raises:
            FormatError: see :func:`uqff.models.assets.companions_of`.
        """
        companions_of(self.path)

    def write_companions(
        self, directory: Path, config: Mapping[str, Any] | None, dtype: DType
    ) -> tuple[list[str], list[str]]:
        """Put configuration and tokenizer beside a model that is made of the checkpoint.

        Args:
            directory: of the model.
            config: what ``config.json`` is to say; None for what it says.
            dtype: the load dtype.

        Returns:
            Names of the files; and what could not be made, in sentences.
        """
        if self.config_path.name == CONFIG_NAME:
            return copy_companions(self.path, directory, config=config), []
        names = copy_companions(self.path, directory, leave=[CONFIG_NAME])
        write_json(directory / CONFIG_NAME, self.config if config is None else config)
        return [CONFIG_NAME, *names], []

    def close(self) -> None:
        """Release the files. Tensors already taken out stay valid."""
        for file in self._files:
            file.close()

    def __repr__(self) -> str:
        return f"<TensorFiles {self.path}: {len(self)} tensors>"


def open_tensors(source: PathLike) -> TensorFiles:
    """Open the files of a checkpoint for reading.

    Args:
        source: a directory; or, if there is none of that name, the id of a repository on the Hugging Face hub
            (``owner/name``, see :mod:`uqff.hub.names`), which is fetched into the hub's cache. The latter needs
            ``huggingface_hub``.

    Raises:
        FormatError: a file breaks a rule.
        ShardError: the index and the files do not fit together.
        HubError: the hub did not give it.
        UnsupportedError: a hub id without ``huggingface_hub``.
        FileNotFoundError: no such directory, or no weights in it.
        OSError: a file cannot be read.
    """
    name = hub_name(source)
    path = Path(source) if name is None else fetch(name, no_models)
    if not path.is_dir():
        raise FileNotFoundError(f"no such directory: {source}")
    config_path = path / CONFIG_NAME
    config = read_config(config_path) if is_present(config_path) else {}
    files: list[MappedFile] = []
    try:
        if _is_of_its_authors(path):
            config_path = path / PARAMS_NAME
            config = read_config(config_path)
            files.append(MappedFile(path / CONSOLIDATED_NAME))
        elif is_present(path / SINGLE_NAME):
            files.append(MappedFile(path / SINGLE_NAME))
        elif is_present(path / INDEX_NAME):
            _open_shards(path / INDEX_NAME, files)
        else:
            files.append(MappedFile(_only_file(path)))
        return TensorFiles(path, config, files, config_path)
    except BaseException:
        for file in files:
            file.close()
        raise


def _is_of_its_authors(path: Path) -> bool:
    """Whether the engine loads a model in the layout of its authors."""
    names = [each for each in (CONFIG_NAME, PARAMS_NAME, CONSOLIDATED_NAME) if is_present(path / each)]
    return is_read_as_consolidated(names, lambda name: read_config(path / name))


def _only_file(directory: Path) -> Path:
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(f"no safetensors file in {directory}")
    raise ShardError(
        "several safetensors files without an index",
        file=str(directory),
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        got=", ".join(path.name for path in found[:5]),
    )


def _open_shards(index: Path, files: list[MappedFile]) -> None:
    weight_map = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("not a map of tensors to file names", file=str(index), field="weight_map")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise FormatError("too many files", file=str(index), field="weight_map", expected=MAX_SHARDS, got=len(names))
    for name in names:
        _check_sibling(index, name)
    for name in names:
        if not os.path.isfile(index.parent / name):  # unlike Path.is_file, False for a name that no file can have
            raise ShardError("a file of the index is missing", file=str(index), field="weight_map", got=name)
        files.append(MappedFile(index.parent / name))
    entries = dict(zip(names, (file.header.entries for file in files), strict=True))
    for tensor, name in weight_map.items():
        if tensor not in entries[name]:
            raise ShardError("a tensor of the index is missing", file=str(index.parent / name), field=tensor)


def _check_sibling(index: Path, name: str) -> None:
    """A plain name: no directory part, on any system, and no hidden file."""
    if not name.endswith(".safetensors") or name.startswith(".") or any(c in name for c in "/\\:\0"):
        raise FormatError(
            "not the name of a sibling file",
            file=str(index),
            field="weight_map",
            expected="a plain name that ends in .safetensors",
            got=name,
        )
