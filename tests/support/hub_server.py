"""A hub of our own: a server on this machine that speaks the HTTP of the Hugging Face hub, and can be made to fail.

Repositories are dictionaries of bytes.  Large files (``.uqff``, ``.safetensors``, ``.gguf``) are stored as LFS objects:
``resolve`` sends those who ask for one to another host, as the hub does, with a signature in the address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

LARGE = (".uqff", ".safetensors", ".gguf")
TOKEN = "hf_" + "secretsecretsecretsecret"
SIGNATURE = "X-Signature=signed"


def commit_of(files: dict[str, bytes]) -> str:
    """The commit of some files."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


@dataclass
class Asked:
    """A request as it came."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""
    sent: int = 0

    @property
    def host(self) -> str:
        """The host that was asked."""
        return self.headers["host"].partition(":")[0]


Fault = Callable[["Handler", Asked], bool]
"""Answers a request in its own way, or tells that it does not."""


@dataclass
class Hub:
    """The state of the server: commits by repository and revision, LFS objects, what was asked, what fails."""

    port: int = 0
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    fault: Fault | None = None
    private: set[str] = field(default_factory=set)
    created: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files; the commit is returned."""
        commit = commit_of(files)
        self.commits[repo, commit] = dict(files)
        self.branches[repo, branch] = commit
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return commit

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit that a revision names."""
        if (repo, revision) in self.commits:
            return revision
        return self.branches.get((repo, revision))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        commit = self.commit(repo, revision)
        return {} if commit is None else self.commits[repo, commit]

    def bytes_sent(self, suffix: str = "") -> int:
        """How many bytes of bodies went out for paths that end so."""
        return sum(each.sent for each in self.asked if each.path.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: Hub
    asked: Asked

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if (self.headers.get("Transfer-Encoding") or "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked = Asked(self.command, path, query, headers, body)
        with self.hub.lock:
            self.hub.asked.append(self.asked)
        if self.hub.fault is not None and self.hub.fault(self, self.asked):
            return
        self.route()

    def route(self) -> None:
        """The answer of a hub at its best."""
        for pattern, answer in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {self.asked.path}")
            if match is not None:
                repo = match.groupdict().get("repo")
                if repo in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                    return
                answer(self, **match.groupdict())
                return
        self.send(404, b"{}")

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """An answer."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.asked.sent += len(body)
            self.wfile.write(body)

    def json(self, document: Any, status: int = 200) -> None:
        """An answer in JSON."""
        self.send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def found(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None after an answer that says that there is none."""
        if not any(each == repo for each, _ in self.hub.commits):
            code, message = "RepoNotFound", "Repository not found"
        elif self.hub.commit(repo, unquote(revision)) is None:
            code, message = "RevisionNotFound", f"Invalid rev id: {revision}"
        else:
            return self.hub.commit(repo, unquote(revision))
        self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": message})
        return None

    def model(self, repo: str, revision: str = "main") -> None:
        """What is in a repository."""
        commit = self.found(repo, revision)
        if commit is None:
            return
        siblings = [{"rfilename": name, **_listed(name, data)} for name, data in self.hub.files(repo, commit).items()]
        self.json({"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        """The tree of a repository."""
        commit = self.found(repo, revision)
        if commit is None:
            return
        rows = []
        for name, data in self.hub.files(repo, commit).items():
            row = _listed(name, data)
            lfs = row.pop("lfs", None)
            more = {"lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}} if lfs else {}
            rows.append({"type": "file", "path": name, "size": row["size"], "oid": row["blobId"], **more})
        self.json(rows)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """A file: small ones at once, of large ones where they are."""
        commit = self.found(repo, revision)
        if commit is None:
            return
        data = self.hub.files(repo, commit).get(unquote(path))
        if data is None:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        sha256 = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            place = f"http://localhost:{self.hub.port}/cdn/{sha256}?{SIGNATURE}"
            headers |= {"Location": place, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
            self.send(302, b"", headers)
        else:
            self.ranged(data, headers)

    def cdn(self, oid: str) -> None:
        """A large file."""
        if self.asked.query != SIGNATURE:
            self.send(403)
        elif oid not in self.hub.objects:
            self.send(404)
        else:
            self.ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def ranged(self, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that is asked for."""
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", self.headers.get("Range") or "")
        if match is None:
            headers["Content-Length"] = str(len(data))
            self.send(200, data, headers)
            return
        begin, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1) + 1
        if begin >= len(data):
            self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send(206, data[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    def create(self) -> None:
        """A new repository, or 409 if it is there."""
        asked = json.loads(self.asked.body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        with self.hub.lock:
            there = any(each == repo for each, _ in self.hub.commits)
            self.hub.created.append(asked)
        if there:
            self.json({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"}, 409)
            return
        self.hub.put(repo, {".gitattributes": b"*.uqff filter=lfs\n"})
        self.json({"url": f"{self.hub.endpoint}/{repo}"})

    def preupload(self, repo: str, revision: str) -> None:
        """Which files are large."""
        if self.found(repo, revision) is None:
            return
        files = json.loads(self.asked.body)["files"]
        rows = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for each in files
        ]
        self.json({"files": rows})

    def batch(self, repo: str) -> None:
        """Where large files go; those that are there go nowhere."""
        asked = json.loads(self.asked.body)
        rows = []
        for each in asked["objects"]:
            there = each["oid"] in self.hub.objects
            upload = {"upload": {"href": f"http://localhost:{self.hub.port}/put/{each['oid']}?{SIGNATURE}"}}
            rows.append({"oid": each["oid"], "size": each["size"], **({} if there else {"actions": upload})})
        self.send(
            200,
            json.dumps({"transfer": "basic", "objects": rows}).encode(),
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def put(self, oid: str) -> None:
        """A large file comes."""
        if hashlib.sha256(self.asked.body).hexdigest() != oid:
            self.send(400)
            return
        self.hub.objects[oid] = self.asked.body
        self.send(200)

    def commit(self, repo: str, revision: str) -> None:
        """Files become a commit."""
        commit = self.found(repo, revision)
        if commit is None:
            return
        files = dict(self.hub.files(repo, commit))
        for line in self.asked.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        branch = "refs/pr/1" if "create_pr=1" in self.asked.query else unquote(revision)
        made = self.hub.put(repo, files, branch)
        url = f"{self.hub.endpoint}/{repo}/commit/{made}"
        pr = {"pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/1"} if branch == "refs/pr/1" else {}
        self.json({"success": True, "commitUrl": url, "commitOid": made, "hookOutput": "", **pr})

    def branch(self, repo: str, revision: str) -> None:
        """A new branch."""
        self.hub.branches[repo, unquote(revision)] = self.hub.branches[repo, "main"]
        self.json({})

    def yaml(self) -> None:
        """A model card is well formed."""
        self.json({"errors": [], "warnings": []})

    def whoami(self) -> None:
        """Whose token it is."""
        self.json({"name": "owner", "type": "user", "auth": {"type": "access_token", "accessToken": {"role": "write"}}})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>refs/pr/[0-9]+|[^/]+)"

ROUTES: list[tuple[str, Any]] = [
    (rf"(?:GET|HEAD) /api/models/{REPO}", Handler.model),
    (rf"(?:GET|HEAD) /api/models/{REPO}/revision/{REVISION}", Handler.model),
    (rf"GET /api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.*))?", Handler.tree),
    (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    (r"(?:GET|HEAD) /cdn/(?P<oid>[0-9a-f]{64})", Handler.cdn),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /put/(?P<oid>[0-9a-f]{64})", Handler.put),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (rf"POST /api/models/{REPO}/branch/{REVISION}", Handler.branch),
    (r"POST /api/validate-yaml", Handler.yaml),
    (r"GET /api/whoami-v2", Handler.whoami),
]


def _blob(data: bytes) -> str:
    """The name that git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _listed(name: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}} if name.endswith(LARGE) else {}
    return {"size": len(data), "blobId": _blob(data), **lfs}


class Server(ThreadingHTTPServer):
    """Says nothing of clients that have gone."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing."""


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Any, token: str | None = None) -> Iterator[Hub]:
    """The server, while the block runs, and ``huggingface_hub`` told to ask it, quickly, with its cache in a folder."""
    from huggingface_hub import constants, file_download, hf_api, lfs

    from uqff.hub import client

    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        "HF_HUB_ETAG_TIMEOUT": 1,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
        for module in (file_download, hf_api, lfs):  # before 1.0, some of them have names of their own
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(client, "DELAYS", [0.0, 0.0])
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
