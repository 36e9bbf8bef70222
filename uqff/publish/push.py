"""Uploading a model directory to the Hugging Face hub: :func:`push`.

Everything that can be found out on this machine is found out first: the structure of the models, the report, which
files go and which stay, their digests, the card.  Then large files go one after the other, and when all are there one
commit makes them appear together.  What the hub has already is not sent again, so an upload that broke off is gone on
with by asking for it once more.

Authority: huggingface_hub, ``hf_api.py`` (``create_repo``, ``preupload_lfs_files``, ``create_commit``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uqff._version import __version__
from uqff.container.beside import LAYER_SUMS_NAME, SUMS_NAME, not_of
from uqff.container.document import read_json
from uqff.container.file import open_uqff
from uqff.container.report import Report, read_report
from uqff.container.shards import PathLike, check_inside, models_in
from uqff.errors import FormatError, HubError, ShardError, UnsupportedError
from uqff.hub.client import RemoteFolder, hub_error, imported, redacted_logs
from uqff.hub.fetch import bars
from uqff.hub.names import BARE, HubName
from uqff.inspection.checksum import encoded, read_sums, sums_text
from uqff.inspection.digests import FileDigest, digest_files
from uqff.inspection.summary import summarize
from uqff.inspection.verify import verify
from uqff.limits import MAX_CONFIG_BYTES, MAX_REPORT_BYTES
from uqff.progress import Progress, Steps
from uqff.publish.card import MADE_BY, CardModel, model_card

__all__ = ["CARD_NAME", "Pushed", "push"]

CARD_NAME: Final = "README.md"

KEPT: Final = (CARD_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
"""What goes along though no model needs it."""


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or what would be.

    Attributes:
        repo: the repository.
        revision: the branch; None for the main one.
        files: all files that go, with their digests.
        left: files of the directory that stay: they are of no model.
        card: the text of the model card that was made; None if the directory has its own, or the repository.
        sums: the list of checksums.
        url: of the commit, or of the pull request; None for a dry run.
    """

    repo: str
    revision: str | None
    files: tuple[FileDigest, ...]
    left: tuple[str, ...]
    card: str | None
    sums: str
    url: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


def push(
    directory: PathLike,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    measured: PathLike | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Upload a model directory to the Hugging Face hub, with a model card and checksums.

    Args:
        directory: with ``.uqff`` files and what stands beside them.
        repo: ``owner/name``, which is created if there is none.
        revision: a branch, which is created if there is none; the main one if None.
        private: whether a repository that is created is private; if None, as the owner has it.
        create_pr: open a pull request in place of a commit to the branch; the repository must be there.
        base_model: what was quantised, for the card; if None, what the report says.
        measured: a file with what ``uqff quantize --json`` printed, for the errors in the card.
        message: of the commit.
        dry_run: find out everything, and ask nobody.
        progress: called after each file that was hashed, then after each that was uploaded.

    Raises:
        UqffError: the directory holds no model, or a broken one; its report or its list of checksums does not fit.
        HubError: the hub refused or failed; what has arrived stays there and is not sent again.
        UnsupportedError: ``huggingface_hub`` is not installed.
        OSError: a file cannot be read.

    >>> uqff.push("model", "owner/name", dry_run=True).url is None
    True
    """
    match = BARE.fullmatch(repo)
    if match is None or match["revision"] or match["kind"]:
        raise UnsupportedError("not the name of a repository", expected="owner/name", got=repo)
    home = Path(directory)
    names, left = _names(home)
    models, report = _models(home, measured)
    stated = base_model or (report.base_model if report is not None else None)
    card = None if CARD_NAME in names else model_card(repo, models, stated)
    remote = None if dry_run else _Remote(HubName(repo, revision), create_pr=create_pr)
    digests = {each.name: each for each in digest_files(home, names, progress=progress)}
    _check_sums(home, digests)
    if remote is not None:  # from here on the hub is asked
        remote.create(private=private)
        card = None if card is not None and remote.has_own_card() else card
    made = {} if card is None else {CARD_NAME: card.encode()}
    for name, data in made.items():
        digests[name] = FileDigest(name, len(data), _sha256(data))
    sums = sums_text((name, digests[name].sha256) for name in sorted(digests, key=encoded))
    made[SUMS_NAME] = encoded(sums)
    files = (
        *sorted(digests.values(), key=lambda each: each.name),
        FileDigest(SUMS_NAME, len(made[SUMS_NAME]), _sha256(made[SUMS_NAME])),
    )
    url = None
    if remote is not None:
        url = remote.upload(home, names, made, message or f"Upload with uqff {__version__}", progress)
    return Pushed(repo, revision, files, tuple(left), card, sums, url)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _names(home: Path) -> tuple[list[str], list[str]]:
    """The files that go, and those that stay."""
    with os.scandir(home) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
    left = [name for name in not_of("UQFF model", names) if name not in KEPT]
    going = [name for name in names if name not in left and name not in (SUMS_NAME, LAYER_SUMS_NAME)]
    for name in going:
        check_inside(home / name)
    return going, left


def _models(home: Path, measured: PathLike | None) -> tuple[list[CardModel], Report | None]:
    """The models, if they are sound as far as headers and fields tell, and the report about them."""
    starts = models_in(home)
    if not starts:
        raise ShardError("no .uqff file in the directory", file=str(home))
    for violation in verify(home, structure=True):
        raise FormatError(f"not to be published: {violation}")
    errors = {} if measured is None else _errors(Path(measured))
    report = read_report(home)
    fallbacks = {} if report is None else {output.quant: output.fallback_count for output in report.outputs}
    models = []
    for name, start in starts.items():
        with open_uqff(start) as file:
            files = tuple(path.name for path in file.paths)
            models.append(CardModel(name, files, summarize(file), fallbacks.get(name), errors.get(name)))
    return models, report


def _errors(path: Path) -> dict[str, Mapping[str, float]]:
    """Relative errors by model and type, of what ``uqff quantize --json`` printed."""
    document = read_json(path, MAX_REPORT_BYTES)
    try:
        return {
            str(output["quant"]): {str(row["stored"]): float(row["relative_rms"]) for row in output["types"]}
            for output in document["outputs"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("not what uqff quantize --json prints", file=str(path), got=repr(error)) from error


def _check_sums(home: Path, digests: Mapping[str, FileDigest]) -> None:
    """A list that is there must be right about the files that go: something was changed since it was made."""
    if not (home / SUMS_NAME).is_file():
        return
    for name, expected in read_sums(home / SUMS_NAME).items():
        if name in digests and digests[name].sha256 != expected:
            raise FormatError(
                "file is not as the list of checksums says",
                file=str(home / SUMS_NAME),
                field=name,
                expected=expected,
                got=digests[name].sha256,
            )


class _Remote:
    """The repository that is uploaded to; nobody is asked before :meth:`create`."""

    def __init__(self, name: HubName, *, create_pr: bool) -> None:
        self._name = name
        self._create_pr = create_pr
        self._hub = imported(str(name), is_target=True)
        if self._hub.constants.HF_HUB_OFFLINE:
            raise HubError("the hub may not be asked: HF_HUB_OFFLINE is set", file=str(name))
        self._api = self._hub.HfApi(library_name="uqff", library_version=__version__)

    def create(self, *, private: bool | None) -> None:
        """Make the repository and the branch, unless they are there; for a pull request they must be."""
        if self._create_pr:
            return
        self._ask("create_repo", private=private, exist_ok=True)
        if self._name.revision is not None and not self._name.revision.startswith("refs/"):
            self._ask("create_branch", branch=self._name.revision, exist_ok=True)

    def _ask(self, what: str, **options: Any) -> Any:
        try:
            with bars(self._hub), redacted_logs():
                return getattr(self._api, what)(self._name.repo, **options)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:  # of a file here
                raise
            raise hub_error(error, self._name, "the hub did not take the model") from None

    def has_own_card(self) -> bool:
        """Whether the repository has a card that somebody wrote."""
        folder = RemoteFolder(self._name)
        if CARD_NAME not in folder.files:
            return False
        return MADE_BY.encode() not in folder.read(CARD_NAME, MAX_CONFIG_BYTES)

    def upload(
        self, home: Path, names: Sequence[str], made: Mapping[str, bytes], message: str, progress: Progress | None
    ) -> str:
        """Send files, and commit them together; the address of the commit, or of the pull request."""
        sources: dict[str, Path | bytes] = {name: home / name for name in names} | dict(made)
        sizes = {name: len(of) if isinstance(of, bytes) else of.stat().st_size for name, of in sources.items()}
        steps = Steps(progress, "push", len(sources), sum(sizes.values()), "bytes")
        operations = []
        for name, source in sources.items():
            given = source if isinstance(source, bytes) else str(source)
            operations.append(self._hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=given))
            self._ask(
                "preupload_lfs_files",
                additions=operations[-1:],
                revision=self._name.revision,
                create_pr=self._create_pr,
                free_memory=False,
            )
            steps.add(name, sizes[name])
        done = self._ask(
            "create_commit",
            operations=operations,
            commit_message=message,
            revision=self._name.revision,
            create_pr=self._create_pr,
        )
        return str(done.pr_url or done.commit_url)
