"""A repository of the hub at one commit: which files it has, and ranges of their bytes.

A branch may move while it is read, so it is looked up once and every file is asked for by the commit.  An answer counts
only if it is what was asked for: status 206, the very range, of a file of the length that was listed, at that commit,
with as many bytes as announced.  What may pass (a dropped connection, too many requests, a server at work on itself) is
asked for again, a few times; everything is bounded in time.

Authority: huggingface_hub, ``hf_api.py`` (``model_info``), ``file_download.py`` (``hf_hub_url``); RFC 9110, section 14.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from uqff._version import __version__
from uqff.errors import HubError, UnsupportedError
from uqff.hub.names import HubName
from uqff.limits import MAX_HUB_FILES

__all__ = [
    "DELAYS",
    "RemoteFile",
    "RemoteFolder",
    "Unreachable",
    "Wanted",
    "hub_error",
    "imported",
    "passes",
    "redacted",
    "redacted_logs",
]

DELAYS: Final = [0.5, 1.0, 2.0]
"""Seconds before each further attempt."""

PACKAGE: Final = "huggingface_hub"

LONGEST_WAIT: Final = 30.0
"""Seconds that a server may ask to be left alone for."""

SLOWEST: Final = 1 << 14
"""Bytes a second; a server that sends fewer is given up, however regularly it sends them."""

CHUNK: Final = 1 << 16
THREADS: Final = 8

PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be others soon."""

NO_ANSWER: Final = (
    "ConnectError", "NetworkError", "RemoteProtocolError", "TimeoutException", "ConnectionError", "Timeout",
)  # fmt: skip
"""What either library calls errors of a connection."""

BROKEN_OFF: Final = ("ChunkedEncodingError", "RemoteProtocolError")
"""What they call an answer that ended too soon; huggingface_hub goes on with it by itself since 1.0."""

REASONS: Final = {
    401: "it does not exist, or it is private and the token that is set, if any, may not read it",
    403: "access is forbidden: it must be asked for on the page of the repository, or the token does not allow it",
    404: "there is no such thing",
    429: "too many requests",
}


class RemoteFile(NamedTuple):
    """A file of a repository: its length, and its SHA-256 where the hub knows it."""

    path: str
    nbytes: int
    sha256: str | None


class Wanted(NamedTuple):
    """A range of a file."""

    path: str
    begin: int
    end: int


@dataclass(frozen=True)
class _Answer:
    """What both libraries have of an answer: requests, under huggingface_hub before 1.0, and httpx."""

    status: int
    headers: Mapping[str, str]
    url: str
    commits: Sequence[str]
    chunks: Iterator[bytes]


class Unreachable(HubError):
    """The hub may not be asked, or did not answer at all: what the cache has may do."""


class _Passing(Exception):
    """An answer that may be another soon, and its headers, which may say how long to wait."""

    def __init__(self, reason: str, headers: Mapping[str, str] | None = None) -> None:
        self.reason, self.headers = reason, headers or {}
        super().__init__(reason)


class RemoteFolder:
    """The files of one folder of a repository, at one commit.

    Attributes:
        name: what was asked for.
        commit: the commit that it means now.
        files: the files of the folder, by their names in it.
    """

    def __init__(self, name: HubName) -> None:
        """Ask the hub which files there are.

        Raises:
            HubError: it does not say.
            UnsupportedError: ``huggingface_hub`` is not installed.
        """
        self.name = name
        self._hub = imported(str(name))
        self._places: dict[str, str] = {}
        if self._hub.constants.HF_HUB_OFFLINE:
            raise Unreachable("the hub may not be asked: HF_HUB_OFFLINE is set", file=str(name))
        found = self._info()
        self.commit = str(found.sha)
        if not re.fullmatch(r"[0-9a-f]{40}", self.commit):
            raise HubError("not a commit", file=str(name), expected="40 hexadecimal digits", got=self.commit)
        self.files = {each.path.rpartition("/")[2]: each for each in _listed(name, found.siblings or ())}

    def _info(self) -> Any:
        """What the hub says of the repository; asked for again as ranges are, but where there is no hub to answer."""
        name, timeout = self.name, self._hub.constants.HF_HUB_ETAG_TIMEOUT
        for attempt in range(len(DELAYS) + 1):
            try:
                return self._hub.HfApi().model_info(
                    name.repo, revision=name.revision, files_metadata=True, timeout=timeout
                )
            except Exception as error:  # noqa: BLE001  (of two libraries of HTTP; none is of this machine's files)
                if not passes(error, attempt):
                    raise hub_error(error, name) from None
        raise AssertionError("unreachable")

    def read(self, name: str, most: int) -> bytes:
        """A whole file of the folder.

        Raises:
            HubError: see :meth:`read_ranges`; or it is longer than ``most``.
        """
        file = self.files[name]
        if file.nbytes > most:
            raise HubError("file is too long", file=self.shown(name), expected=f"at most {most} bytes", got=file.nbytes)
        return self._read(Wanted(name, 0, file.nbytes))

    def read_ranges(self, wanted: Sequence[Wanted]) -> Iterator[tuple[Wanted, bytes]]:
        """Ranges of files of the folder, several at a time, in any order.

        Raises:
            HubError: the hub refused, could not be reached, or sent something else; file, range and what came instead
                are named.
        """
        with ThreadPoolExecutor(THREADS, thread_name_prefix="uqff-hub") as pool:
            try:
                yield from zip(wanted, pool.map(self._read, wanted), strict=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def shown(self, name: str) -> str:
        """The full name of a file of the folder."""
        folder = HubName(self.name.repo, self.name.revision, self.name.folder)
        return f"{folder}/{name}"

    def _read(self, wanted: Wanted) -> bytes:
        if wanted.begin == wanted.end:
            return b""
        for attempt in range(len(DELAYS) + 1):
            try:
                return self._attempt(wanted)
            except _Passing as passing:
                if attempt == len(DELAYS):
                    raise self._wrong(wanted, f"the hub failed {attempt + 1} times", passing.reason) from None
                _pause(attempt, passing.headers)
        raise AssertionError("unreachable")

    def _wrong(self, wanted: Wanted, problem: str, got: object) -> HubError:
        expected = f"bytes {wanted.begin} to {wanted.end}"
        return HubError(problem, file=self.shown(wanted.path), expected=expected, got=redacted(str(got)))

    def _attempt(self, wanted: Wanted) -> bytes:
        file = self.files[wanted.path]
        origin = self._hub.hf_hub_url(self.name.repo, file.path, revision=self.commit)
        url = self._places.get(file.path, origin)
        try:
            with _asked(self._hub, url, f"bytes={wanted.begin}-{wanted.end - 1}", _is_same_host(url, origin)) as answer:
                if answer.status in (401, 403, 404, 410) and url != origin:  # the signature of the place has expired
                    self._places.pop(file.path, None)
                    raise _Passing(f"status {answer.status}")
                data = self._body(answer, wanted, file)
                if answer.url != url:
                    self._places[file.path] = answer.url
                return data
        except (HubError, _Passing):
            raise
        except Exception as error:  # noqa: BLE001  (likewise)
            raise _Passing(f"{type(error).__name__}: {error}".partition("\n")[0]) from None

    def _body(self, answer: _Answer, wanted: Wanted, file: RemoteFile) -> bytes:
        """The bytes of an answer, if it is the one to the question."""
        status, headers = answer.status, answer.headers
        if status in PASSING:
            raise _Passing(f"status {status}, {REASONS.get(status, 'an error of its own')}", headers)
        if status not in (200, 206):
            raise self._wrong(wanted, "the hub refuses", f"status {status}, {REASONS.get(status, 'without a reason')}")
        for commit in answer.commits:
            if commit != self.commit:
                raise self._wrong(wanted, "the hub sent another commit", commit)
        coding = headers.get("Content-Encoding") or "identity"
        if coding != "identity":
            raise self._wrong(wanted, "the hub sent an encoded range", coding)
        if status == 206:
            said = headers.get("Content-Range") or "no Content-Range"
            match = re.fullmatch(r"bytes ([0-9]{1,20})-([0-9]{1,20})/([0-9]{1,20}|\*)", said.strip())
            if match is None or (int(match[1]), int(match[2]) + 1) != (wanted.begin, wanted.end):
                raise self._wrong(wanted, "the hub sent another range", said)
            if match[3] not in ("*", str(file.nbytes)):
                raise self._wrong(wanted, "the file has another length than was listed", f"{match[3]} bytes")
        elif (wanted.begin, wanted.end) != (0, file.nbytes):
            raise self._wrong(wanted, "the hub sends no ranges", "the whole file")
        size, data = wanted.end - wanted.begin, bytearray()
        until = time.monotonic() + 2 * self._hub.constants.HF_HUB_DOWNLOAD_TIMEOUT + size / SLOWEST
        for chunk in answer.chunks:
            data += chunk
            if len(data) > size:
                raise self._wrong(wanted, "the hub sent more than was asked for", f"more than {size} bytes")
            if time.monotonic() > until:
                raise self._wrong(wanted, "the hub is too slow", f"{len(data)} bytes in all that time")
        if len(data) < size:
            raise _Passing(f"{len(data)} of {size} bytes")
        return bytes(data)


def _listed(name: HubName, siblings: Sequence[Any]) -> Iterator[RemoteFile]:
    """The files right in the folder that is meant; of others nothing is made."""
    if len(siblings) > MAX_HUB_FILES:
        raise HubError("too many files", file=str(name), expected=f"at most {MAX_HUB_FILES}", got=len(siblings))
    start = f"{name.folder}/" if name.folder else ""
    for each in siblings:
        path = str(each.rfilename)
        last = path.removeprefix(start)
        if not path.startswith(start) or not last or any(c in last for c in "/\\:\0") or last in (".", ".."):
            continue
        size = each.size
        if type(size) is not int or not 0 <= size < 2**63:
            raise HubError("file without a length", file=f"{HubName(name.repo)}/{path}", got=size)
        sha256 = getattr(each.lfs, "sha256", None)
        yield RemoteFile(path, size, sha256 if re.fullmatch(r"[0-9a-f]{64}", str(sha256)) else None)


def _is_same_host(url: str, other: str) -> bool:
    return urlsplit(url)[:2] == urlsplit(other)[:2]


def passes(error: Exception, attempt: int) -> bool:
    """Whether what the hub's package raised may be another answer soon; if so, wait for it.

    Args:
        error: of the package.
        attempt: how many there were before this one, of which there are ``len(DELAYS) + 1``.
    """
    answer = _answer_of(error)
    broke_off = any(kind.__name__ in BROKEN_OFF for kind in type(error).__mro__)
    if attempt >= len(DELAYS) or not (broke_off or getattr(answer, "status_code", None) in PASSING):
        return False
    _pause(attempt, getattr(answer, "headers", {}))
    return True


def _answer_of(error: BaseException | None) -> Any:
    """The answer that an error is about, or that it was made of; None if there is none."""
    while error is not None:
        answer = getattr(error, "response", None)
        if answer is not None:
            return answer
        error = error.__cause__
    return None


def _pause(attempt: int, headers: Mapping[str, str]) -> None:
    """Wait before the next attempt, as long as the server asks for, within bounds."""
    time.sleep(max(DELAYS[attempt], min(_seconds(headers.get("Retry-After") or ""), LONGEST_WAIT)))


def _seconds(text: str) -> float:
    """How long ``Retry-After`` says to wait, in seconds or by a date (RFC 9110, 10.2.3); 0 if neither."""
    if re.fullmatch(r"[0-9]{1,6}", text.strip()):
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0


@contextlib.contextmanager
def _asked(hub: ModuleType, url: str, span: str, with_token: bool) -> Iterator[_Answer]:
    """Ask for a range of an address; redirections are followed, and other hosts get no token."""
    headers = hub.utils.build_hf_headers(
        library_name="uqff", library_version=__version__, token=None if with_token else False
    )
    headers |= {"Range": span, "Accept-Encoding": "identity"}
    session, timeout = hub.utils.get_session(), hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    with contextlib.ExitStack() as stack:
        if callable(getattr(session, "stream", None)):
            got = stack.enter_context(
                session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
            )
            chunks = got.iter_raw()
        else:
            got = stack.enter_context(session.get(url, headers=headers, timeout=timeout, stream=True))
            chunks = _chunks(got.raw)
        commits = [each.headers.get("X-Repo-Commit") for each in (*got.history, got)]
        yield _Answer(got.status_code, got.headers, str(got.url), list(filter(None, commits)), chunks)


def _chunks(raw: Any) -> Iterator[bytes]:
    """What has come, as it comes: one who waits for a whole chunk would wait for a slow server without an end."""
    if not hasattr(raw, "read1"):  # before urllib3 2.1
        yield from raw.stream(CHUNK, decode_content=False)
        return
    while chunk := raw.read1(CHUNK, decode_content=False):
        yield chunk


def imported(name: str, *, is_target: bool = False) -> ModuleType:
    """The package ``huggingface_hub``.

    Args:
        name: of the repository.
        is_target: whether it is written to; else whoever named it may have meant a file.

    Raises:
        UnsupportedError: it is not installed; how to get it is said.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants  # an attribute of the package only once somebody has imported it
        import huggingface_hub.utils
    except ImportError:
        problem = "a repository of the hub needs huggingface_hub (pip install 'uqff-format[hub]')"
        raise UnsupportedError(
            problem if is_target else f"no such file or directory, and {problem}", got=name
        ) from None
    return huggingface_hub


def redacted(text: str) -> str:
    """A text without what gives access: tokens, and the signatures of addresses."""
    with contextlib.suppress(Exception):  # the token of a broken configuration, which is not read either
        import huggingface_hub

        token = huggingface_hub.get_token()
        text = text.replace(token, "***") if token else text
    text = re.sub(r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9_]{8,}", "hf_***", text)
    return re.sub(r"([\w%/.-])\?[\w%.-]+=[^\s'\"<>)]*", r"\1?...", text)


@contextlib.contextmanager
def redacted_logs() -> Iterator[None]:
    """What the package logs, without what gives access: it names addresses as they are, when it asks again."""
    import huggingface_hub.file_download  # noqa: F401  (which has its logger from then on)

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True

    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(PACKAGE)]
    for logger in loggers:
        logger.addFilter(redact)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact)


def hub_error(error: Exception, name: HubName | str, doing: str = "the hub did not answer as it should") -> HubError:
    """What the hub's package raised, as one line without anything secret.

    Args:
        error: of the package, or of the library beneath it.
        name: of the repository.
        doing: what went wrong, if nothing closer is known.
    """
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # of a file that was being uploaded
        error = error.__cause__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return HubError("access to the repository must be asked for on its page", file=str(name))
    if "RepositoryNotFoundError" in kinds:
        return HubError("no such repository, or it is private", file=str(name))
    if "RevisionNotFoundError" in kinds:
        return HubError("no such revision of the repository", file=str(name))
    status = getattr(_answer_of(error), "status_code", None)
    if status in REASONS:
        return HubError("the hub refuses", file=str(name), got=f"status {status}, {REASONS[status]}")
    reason = redacted(str(error)).strip().partition("\n")[0].removeprefix("Got: ")
    shown = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    made = Unreachable if status is None and not kinds.isdisjoint(NO_ANSWER) else HubError
    return made(doing, file=str(name), got=shown)
