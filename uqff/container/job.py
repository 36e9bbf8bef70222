"""The shape of what makes a model: planned when it is made, carried out by ``run``, which gives a typed result.

Quantisation, migration, conversion and dequantisation are such jobs.  Whatever can be refused is refused by the plan,
before anything is written.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from uqff.container.beside import What
from uqff.container.shards import PathLike
from uqff.container.staging import (
    Journal,
    allocated_bytes,
    check_space,
    check_target,
    resumable_directory,
    staged_directory,
)
from uqff.progress import Progress

__all__ = ["Job", "Staging"]

Made = TypeVar("Made")


class Staging(NamedTuple):
    """Where a job works.

    Attributes:
        directory: to fill.
        target: what it will be called.
        journal: what an interrupted run had done, if the job is to be resumable.
    """

    directory: Path
    target: Path
    journal: Journal | None = None

    @property
    def begun(self) -> bool:
        """Whether files are there already."""
        return self.journal is not None and self.journal.begun


class Job(ABC, Generic[Made]):
    """A directory to be made, whole or not at all."""

    MAKES: ClassVar[What] = "UQFF model"
    """What is made, and what alone may be replaced."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that will be written, headers and small files aside."""

    @abstractmethod
    def write(self, stage: Staging, progress: Progress | None) -> Made:
        """Fill a directory, every file flushed to the disk."""

    def description(self) -> Mapping[str, Any]:
        """What the files depend on, as JSON values: an interrupted run is resumed only where all of it is the same.

        Raises:
            NotImplementedError: runs cannot be resumed.
        """
        raise NotImplementedError

    def run(
        self, target: PathLike, *, force: bool = False, resume: bool = False, progress: Progress | None = None
    ) -> Made:
        """Make the directory.

        Args:
            target: the directory.
            force: replace what is there already, if it is of the kind that is made.
            resume: if the run is interrupted, keep what is done; if one was, go on from there.
            progress: is told of every step.

        Raises:
            FileExistsError: ``target`` is there and may not be replaced.
            OSError: reading or writing failed (a full disk, say); nothing stays behind unless it is to be resumed.
        """
        target = Path(target)
        check_target(target, force=force, what=self.MAKES)
        with contextlib.ExitStack() as stack:
            journal = None
            if resume:
                staging = resumable_directory(target, self.description(), force=force, what=self.MAKES)
                directory, journal = stack.enter_context(staging)
            else:
                directory = stack.enter_context(staged_directory(target, force=force, what=self.MAKES))
            check_space(target, self.nbytes - allocated_bytes(directory))
            return self.write(Staging(directory, target, journal), progress)
