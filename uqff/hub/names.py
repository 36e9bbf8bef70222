"""What names a repository of the Hugging Face hub, in place of a path.

::

    owner/name                  if nothing on this machine has that name
    owner/name@revision         a branch, a tag, a commit, refs/pr/N
    hf://owner/name[@revision][/path]
    ...:TYPE                    of several models the one of that type, as of a directory
    ...:FILE                    a file of the folder, by an ending that models have: owner/name:model-Q4_K_M.gguf
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote

from uqff.errors import UnsupportedError

__all__ = ["GGUF_PART", "NO_PROJECTOR", "HubName", "hub_name", "is_hub_name", "is_projector_name", "several_projectors"]

SCHEME: Final = "hf://"

REFERENCE: Final = r"refs/(?:pr|convert)/[^/:@]+"
"""Revisions with slashes that need no escape."""

BARE: Final = re.compile(
    rf"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>{REFERENCE}|[^/:@]+))?(?::(?P<kind>[^/:@]+))?"
)
WHOLE: Final = re.compile(
    rf"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>{REFERENCE}|[^/:@]+))?"
    r"(?P<path>(?:/[^/:]+)*)/?(?::(?P<kind>[^/:@]+))?"
)

FILES: Final = (".uqff", ".gguf", ".safetensors", ".json", ".txt")
"""Endings of files, which no repository is called by."""

MODELS: Final = "models/"
"""May stand before a name with a scheme; also an owner may be called so."""

GGUF_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
"""The name of one file of a split GGUF file."""

NO_PROJECTOR: Final = "none"
"""In place of the name of an ``mmproj`` file."""

OTHERS: Final = ("datasets/", "spaces/", "buckets/")


@dataclass(frozen=True)
class HubName:
    """A repository of models, or something in it.

    Attributes:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the main branch.
        path: of a folder or a file in it; empty for its root.
        kind: the type that is meant of several models; None if none is named.
    """

    repo: str
    revision: str | None = None
    path: str = ""
    kind: str | None = None

    def __str__(self) -> str:
        """The name in full, without the type."""
        at = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        kind = MODELS if self.repo.startswith(MODELS) else ""
        return f"{SCHEME}{kind}{self.repo}{at}" + (f"/{self.path}" if self.path else "")

    @property
    def text(self) -> str:
        """The name in full, as one gives it to a command."""
        return f"{self}:{self.kind}" if self.kind is not None else str(self)

    @property
    def file(self) -> str | None:
        """The name of the file that is meant; None for a folder."""
        last = self.path.rpartition("/")[2]
        return last if last.endswith(FILES) else None

    @property
    def folder(self) -> str:
        """The path of the folder that is meant, or that holds the file."""
        return self.path if self.file is None else self.path.rpartition("/")[0]

    def of(self, kind: str | None) -> HubName:
        """The same, with a type where none is named."""
        return self if kind is None or self.kind is not None else replace(self, kind=kind)


def hub_name(source: object) -> HubName | None:
    """What a source names on the hub; None if it is none of its names, or the path of something on this machine.

    Raises:
        UnsupportedError: it begins with ``hf://`` and is no name of a model there.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    text = os.fspath(source)
    if not isinstance(text, str):
        return None
    if text.startswith(SCHEME):
        rest = text[len(SCHEME) :].removeprefix(MODELS)
        match = None if rest.startswith(OTHERS) else WHOLE.fullmatch(rest)
        if match is None or ".." in rest.split("/"):
            raise UnsupportedError(
                "not the name of a model on the hub", expected=f"{SCHEME}owner/name[@revision][/path]", got=text
            )
        return _made(match, match["path"].strip("/"))
    match = BARE.fullmatch(text)
    if match is None or (text.endswith(FILES) and match["kind"] is None) or os.path.lexists(text):
        return None
    if os.path.lexists(match["repo"]):  # a directory, whose type or revision is mistyped
        return None
    return _made(match, "")


def _made(match: re.Match[str], path: str) -> HubName:
    revision, kind = match["revision"], match["kind"]
    if kind is not None and kind.endswith(FILES):
        path, kind = f"{path}/{kind}".lstrip("/"), None
    return HubName(match["repo"], None if revision is None else unquote(revision), path, kind)


def is_hub_name(source: object) -> bool:
    """Whether a source that may be a path names a repository of the hub."""
    return hub_name(source) is not None


def is_projector_name(name: str) -> bool:
    """Whether a file is called like the part of a model that sees or hears."""
    return "mmproj" in name.lower() and name.endswith(".gguf")


def several_projectors(names: Sequence[str]) -> str:
    """What is to be said where there are several, and none was named."""
    return f"several mmproj files: choose one (--mmproj {names[0]}), or the text model alone (--mmproj {NO_PROJECTOR})"
