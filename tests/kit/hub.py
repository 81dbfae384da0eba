"""A loopback stand-in for the Hugging Face hub: real HTTP, so that the real huggingface_hub is what gets tested.

    with FakeHub() as hub:
        commit = hub.add("org/name", folder)                # a model with the folder's files, as they are now
        hub.add("org/name", folder, revision="v2")          # another branch of it
        hub.gate("org/name", token="secret")                # its files ask for that token (401, GatedRepo)
        hub.break_midway("org/name", "model.safetensors")   # the connection drops in the middle of this file
        hub.refuse("org/name", 401)                         # every request for it gets this status
        run_in_subprocess(env=hub.environment(tmp_path))

What has not been added is unknown (404). huggingface_hub reads HF_ENDPOINT when it is imported, so its user runs in
a process of its own, started with `hub.environment(home)`: this endpoint, a cache under `home`, no proxy.

Served: model info (with and without revision), the file tree, refs, and HEAD, GET and Range on `resolve`, with the
ETag and X-Repo-Commit headers that the client's cache is built on. `hub.requests` lists what was asked for.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

_HUB_VARIABLES = ("HF_", "HUGGING", "TRANSFORMERS_")


@dataclass(frozen=True)
class Revision:
    commit: str
    files: dict[str, bytes]


@dataclass
class Repository:
    revisions: dict[str, Revision] = field(default_factory=dict)
    token: str | None = None
    private: bool = False
    refusal: int | None = None
    breaking: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    def find(self, name: str) -> Revision | None:
        """By branch or by commit."""
        by_commit = {revision.commit: revision for revision in self.revisions.values()}
        return self.revisions.get(name) or by_commit.get(name)


class FakeHub:
    """The server; it answers from entering the `with` block until leaving it."""

    def __init__(self, handler: type["Handler"] | None = None) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        handler = type("Handler", (handler or Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, folder: Path, *, revision: str = "main") -> str:
        """Publishes the folder's files as they are now; the commit hash that they got."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha1(f"{repo}@{revision}".encode())
        for name, content in files.items():
            digest.update(name.encode() + b"\0" + content)
        commit = digest.hexdigest()
        self.repositories.setdefault(repo, Repository()).revisions[revision] = Revision(commit, files)
        return commit

    def gate(self, repo: str, *, token: str) -> None:
        """As on the hub, anyone sees that a gated model exists and what files it has; the files want a token."""
        self.repositories[repo].token = token

    def refuse(self, repo: str, status: int) -> None:
        """401 as for a token that is not valid, 403 as for one without the right, 5xx as for a hub in trouble."""
        self.repositories[repo].refusal = status

    def break_midway(self, repo: str, file: str) -> None:
        """The first GET of the file is cut off halfway; later ones find the hub in trouble (503)."""
        self.repositories[repo].breaking.add(file)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a process needs in its environment to use this hub, with a cache of its own under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_HUB_VARIABLES)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **more,
        }

    def __enter__(self) -> Self:
        # Polled often, because leaving the block waits for one round.
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request: finds the repository that the path names, then the API call or the file."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path
        is_api = path.startswith("/api/models/")
        named = self._split(path.removeprefix("/api/models").strip("/"))
        if named is None:
            self.fail(404, "RepoNotFound", "Repository not found")
        elif refusal := named[1].refusal:
            self.fail(refusal, "", "Invalid credentials in Authorization header" if refusal == 401 else "")
        elif is_api:
            self._answer_api(*named)
        else:
            self._answer_file(*named)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `hub.requests` has it."""

    def _split(self, path: str) -> tuple[str, Repository, list[str]] | None:
        """`org/name/rest/of%2Fpath` -> its id, the repository, and the rest in pieces."""
        for repo, repository in self.hub.repositories.items():
            if path == repo or path.startswith(repo + "/"):
                return repo, repository, [unquote(piece) for piece in path[len(repo) :].split("/")[1:]]
        return None

    def _answer_api(self, repo: str, repository: Repository, pieces: list[str]) -> None:
        if pieces == ["refs"]:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": revision.commit}
                for name, revision in repository.revisions.items()
            ]
            return self.send_json({"branches": branches, "tags": [], "converts": []})
        revision = repository.find(pieces[1] if len(pieces) > 1 else "main")
        if revision is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {pieces[-1]}")
        if pieces[:1] == ["tree"]:
            return self.send_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in revision.files.items()
                ]
            )
        return self.send_json(
            {
                "id": repo,
                "sha": revision.commit,
                "private": repository.private,
                "gated": "manual" if repository.token else False,
                "siblings": [{"rfilename": name} for name in revision.files],
            }
        )

    def _answer_file(self, repo: str, repository: Repository, pieces: list[str]) -> None:
        if pieces[:1] != ["resolve"] or len(pieces) < 3:
            return self.fail(404, "EntryNotFound", "Entry not found")
        revision, name = repository.find(pieces[1]), "/".join(pieces[2:])
        if revision is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {pieces[1]}")
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self.fail(401, "GatedRepo", f"Access to model {repo} is restricted.")
        if name not in revision.files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        if name in repository.broken:
            return self.fail(503, "", "The hub is in trouble")
        return self._send_file(repository, name, revision)

    def _send_file(self, repository: Repository, name: str, revision: Revision) -> None:
        content = revision.files[name]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": revision.commit, "Accept-Ranges": "bytes"}
        status, part = 200, content
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        drops = self.command == "GET" and name in repository.breaking
        self.send(status, part[: len(part) // 2] if drops else part, headers, length=len(part))
        if drops:
            repository.broken.add(name)
            self.close_connection = True

    def send_json(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
