"""A model directory: its quantised models, the tensors beside them, and the configuration.

::

    <stem>-N.uqff             one model or several, each in one shard or more
    <stem>.kept.safetensors   layers of a 1.2 model that an older version has no place for, as a 1.x file
    residual.safetensors      the tensors that are no layers, common to all
    config.json               the configuration
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uqff.container.beside import COMPANIONS, KEPT_SUFFIX
from uqff.container.closing import Closing
from uqff.container.document import is_present
from uqff.container.file import RESIDUAL_NAME, UqffFile
from uqff.container.mapped import MappedFile
from uqff.container.report import REPORT_NAME
from uqff.container.shards import SUFFIX, PathLike, models_in, resolve, select, stem_of
from uqff.errors import ShardError
from uqff.models.assets import CONFIG_NAME
from uqff.models.config import read_config

__all__ = ["KEPT_SUFFIX", "ModelDirectory", "are_uqff", "holds_checkpoint", "holds_uqff"]


def holds_checkpoint(path: PathLike) -> bool:
    """Whether a path is a directory of a checkpoint: with weights in safetensors files, and none in UQFF."""
    place = Path(path)
    return (
        place.is_dir()
        and not models_in(place)
        and any(each.name != RESIDUAL_NAME for each in place.glob("*.safetensors"))
    )


def are_uqff(names: Iterable[str]) -> bool:
    """Whether files are those of a UQFF model, by their names: one is, and none has a checkpoint's weights."""
    known = set(names)
    own = (RESIDUAL_NAME, *COMPANIONS)
    weights = (name for name in known if name.endswith((".safetensors", ".gguf")))
    return any(name.endswith(SUFFIX) for name in known) and all(
        name in own or name.endswith(KEPT_SUFFIX) for name in weights
    )


def holds_uqff(path: PathLike) -> bool:
    """Whether a path is that of a UQFF model, and not also of a checkpoint: a file, a directory, or ``DIR:TYPE``."""
    try:
        place = select(path)
    except (FileNotFoundError, ShardError):
        return False
    return are_uqff(each.name for each in place.iterdir()) if place.is_dir() else place.suffix == SUFFIX


class ModelDirectory(Closing):
    """An open model directory.

    Attributes:
        path: the directory.
        models: the quantised models, by the stem of their names.
        kept: what is kept beside them, by the same.
        residual: the file of the residual, None if there is none.
        config: of ``config.json``, see :mod:`uqff.models.config`; empty if there is none.
        others: names of all other files, sorted.
    """

    def __init__(self, source: PathLike) -> None:
        """Open it; only headers are read.

        Args:
            source: the directory; or one of the ``.uqff`` files in it, or ``DIR:TYPE``, whose model is then the only
                one.

        Raises:
            UqffError: a file breaks a rule, or the models are of both generations.
            OSError: a file cannot be read.
        """
        source = select(source)
        self.path = source if source.is_dir() else source.parent
        self.models: dict[str, UqffFile] = {}
        self.kept: dict[str, UqffFile] = {}
        self.residual: MappedFile | None = None
        try:
            for stem, paths, complete in _models(source):
                self.models[stem] = UqffFile(paths, complete=complete)
            generations = {file.generation for file in self.models.values()}
            if len(generations) > 1:
                raise ShardError(
                    f"models of two generations in the directory: choose one, such as {self.path}:{min(self.models)}",
                    file=str(self.path),
                )
            for stem in self.models:
                kept = self.path / f"{stem}{KEPT_SUFFIX}"
                if is_present(kept):
                    self.kept[stem] = UqffFile([kept])
            if is_present(self.path / RESIDUAL_NAME):
                self.residual = MappedFile(self.path / RESIDUAL_NAME)
            config = self.path / CONFIG_NAME
            self.config: dict[str, Any] = read_config(config) if is_present(config) else {}
        except BaseException:
            self.close()
            raise
        known = {RESIDUAL_NAME, REPORT_NAME, *(f"{stem}{KEPT_SUFFIX}" for stem in self.kept)}
        names = (entry.name for entry in os.scandir(self.path) if entry.is_file())
        self.others = sorted(name for name in names if name not in known and not name.endswith(SUFFIX))

    def close(self) -> None:
        """Release the files."""
        for file in (*self.models.values(), *self.kept.values()):
            file.close()
        if self.residual is not None:
            self.residual.close()


def _models(source: Path) -> list[tuple[str, list[Path], bool]]:
    """Stem and files of each model."""
    if not source.is_dir():
        paths, complete = resolve(source)
        return [(stem_of(paths[0].name), paths, complete)]
    names = sorted(
        entry.name for entry in os.scandir(source) if entry.name.endswith(SUFFIX) and is_present(Path(entry))
    )
    if not names:
        raise ShardError(f"no {SUFFIX} file in the directory", file=str(source))
    found: dict[str, tuple[str, list[Path], bool]] = {}
    for name in names:
        stem = stem_of(name)
        if stem not in found:
            found[stem] = (stem, *resolve(source / name))
        elif source / name not in found[stem][1]:
            raise ShardError("two models of one name", file=str(source / name), got=f"also {found[stem][1][0].name}")
    return list(found.values())
