"""Where the layers of a model come from: a directory of UQFF, or a checkpoint.

Both are a mapping from the path of a module to the layer that belongs there, with the configuration beside it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from uqff.checkpoints.checkpoint import open_checkpoint
from uqff.checkpoints.gguf.files import is_gguf
from uqff.checkpoints.model import holds_checkpoint
from uqff.codes import DType
from uqff.container.shards import at_hand, select
from uqff.errors import FormatError, UnsupportedError, UqffError, located
from uqff.hub.names import NO_PROJECTOR
from uqff.models.architectures import last_block
from uqff.models.assets import CONFIG_NAME
from uqff.parallel.checkpoint_source import CheckpointSource
from uqff.parallel.immediate import ImmediateIsq
from uqff.parallel.uqff_source import UqffSource

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from uqff.models.layouts import WeightLayout
    from uqff.models.renaming import ModulePaths
    from uqff.parallel.immediate import Types
    from uqff.parallel.unloaded import Unloaded, UnloadedExperts

TOKENIZER: Final = "tokenizer.json"

__all__ = ["ModelSource", "check_depth", "directory_of", "open_source"]


class ModelSource(Protocol):
    """An open model directory. Only headers have been read; layers are views of the mapped files.

    Attributes:
        name: of the file or directory, for errors.
        directory: where configuration and tokenizer are.
        config: the parsed ``config.json``.
        layout: how the rows of Q and K lie in the files.
        paths: what modules are called in the files.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    layout: WeightLayout
    paths: ModulePaths

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the model is loaded in if nobody says otherwise; None if it does not tell."""

    def __contains__(self, module: object) -> bool:
        """Whether there is a weight of that path, whatever its form."""

    def layer(self, module: str) -> Unloaded:
        """The layer of a module; touches no payload.

        Raises:
            UqffError: there is none.
            UqffError: the layer is not valid.
        """

    def experts(self, path: str, count: int) -> list[UnloadedExperts]:
        """Gate, up and down projections of a mixture: a stack of each, or a layer for each expert.

        Args:
            path: of the experts.
            count: how many there are.

        Raises:
            UqffError: see :meth:`layer`.
        """

    def key(self, module: str) -> str:
        """What errors call the layer of a module."""

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is no layer; a view.

        Raises:
            FormatError: there is none.
        """

    def left(self) -> str | None:
        """The path of a layer of the language model that nobody has asked for; None if there is none."""

    def digest(self, *options: object, everything: bool = False) -> bytes:
        """See :func:`~uqff.parallel.consensus.digest`.

        Args:
            options: what else the ranks must agree on.
            everything: take in every byte.
        """

    def close(self) -> None:
        """Release the files; layers already taken out stay valid."""

    def __enter__(self) -> Self:
        """The source itself."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""


def open_source(
    path: str | os.PathLike[str], isq: Types | ImmediateIsq | None = None
) -> tuple[ModelSource, ImmediateIsq | None]:
    """The source that a path is, and what becomes of its layers while they are loaded.

    It is a checkpoint if it is a directory without ``.uqff`` files or a GGUF file, else UQFF.

    Args:
        path: see :func:`~uqff.parallel.load_model`.
        isq: of UQFF, which model of several; of a checkpoint, what its layers become.

    Raises:
        UqffError: neither, or not valid; or there is no such type.
        OSError: a file cannot be read.
    """
    path = at_hand(path, isq if isinstance(isq, str) else None)
    if holds_checkpoint(path) or is_gguf(path):
        quantising = isq if isq is None or isinstance(isq, ImmediateIsq) else ImmediateIsq(isq)
        return CheckpointSource(path), quantising
    if isq is not None and not isinstance(isq, str):
        raise UnsupportedError(
            "the model is quantised already", file=os.fspath(path), field="isq", expected="a type in it", got=isq
        )
    return UqffSource(path, isq), None


def check_depth(source: ModelSource) -> None:
    """Make sure that a model's last layer is there before modules are made for all: work is bounded by what files hold.

    Raises:
        FormatError: the configuration announces a layer of which there is no weight, or more than any model has.
    """
    path = str(source.directory / CONFIG_NAME)
    with located(file=path):
        names = last_block(source.config)
    if not any(name in source for name in names):
        raise FormatError(
            "the configuration announces more layers than there are",
            file=path,
            field="config.num_hidden_layers",
            expected=f"a weight such as {names[0]}",
            got=source.config.get("num_hidden_layers"),
        )


@contextlib.contextmanager
def directory_of(path: str | os.PathLike[str], isq: object = None) -> Iterator[Path]:
    """The directory of a model, where its tokenizer is; of a GGUF file, a temporary one with what its metadata tell.

    Args:
        path: of UQFF or of a checkpoint; what names a repository is fetched.
        isq: which model of several, if it is a name.

    Raises:
        UqffError: the metadata of a GGUF file are not right, or make no tokenizer.
    """
    kind = isq if isinstance(isq, str) else None
    path = at_hand(path, kind)
    if is_gguf(path):
        checkpoint = open_checkpoint(path, mmproj=NO_PROJECTOR)
        with tempfile.TemporaryDirectory(prefix="uqff-") as made, checkpoint:
            written, missing = checkpoint.tensors.write_companions(Path(made), None, DType.F32)
            if TOKENIZER not in written:
                raise UnsupportedError("; ".join(missing) or "no tokenizer in the file", file=os.fspath(path))
            try:
                yield Path(made)
            except UqffError as error:
                if error.file is not None and error.file.startswith(made):  # which is gone when somebody reads it
                    error.file = os.fspath(path)
                raise
        return
    place = Path(path) if holds_checkpoint(path) else select(path, kind)
    yield place if place.is_dir() else place.parent
