"""A loopback hub that is also written to: what `FakeHub` serves, and what the real huggingface_hub sends.

    with UploadHub(accounts={"hf_me": "me"}) as hub:
        hub.hangs = content                     # a PUT of these bytes is never answered
        run_in_subprocess(env=hub.environment(tmp_path, HF_TOKEN="hf_me"))
        hub.commits[-1].message
        hub.repositories["me/model"].revisions["main"].files

Of the hub's ways for large files it has LFS, with a PUT for a file, or, where one is larger than `chunk`, one for each
part. HF_HUB_DISABLE_XET makes the client take it; the client's own default is Xet, whose server is not imitated. For
that, `large=()` calls every file small.
"""

import base64
import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.kit.hub import FakeHub, Handler, Repository, Revision


@dataclass(frozen=True)
class Commit:
    repo: str
    revision: str
    message: str
    description: str
    added: frozenset[str]
    deleted: frozenset[str] = frozenset()


class UploadHub(FakeHub):
    def __init__(
        self,
        accounts: Mapping[str, str],
        large: Sequence[str] = ("*.safetensors", "*.gguf"),
        chunk: int | None = None,
    ) -> None:
        """`accounts` are tokens, each with the namespace in which it may write."""
        super().__init__(UploadHandler)
        self.accounts, self.large, self.chunk = accounts, large, chunk
        self.commits: list[Commit] = []
        self.blobs: dict[str, bytes] = {}
        """What has arrived whole, by its sha256."""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.sent: list[str] = []
        """The sha256 of each PUT of bytes, in order."""
        self.hanging = Event()
        self.hangs: bytes | None = None
        """A PUT of these bytes, or of some of them, is not answered: `hanging` is set."""
        self.drops = False
        """The connection of the next PUT is closed once its bytes have come."""
        self.refuses: int | None = None
        """The status that every PUT gets."""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].revisions[revision].files


class UploadHandler(Handler):
    """One request. Who asks is known by the token."""

    hub: UploadHub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.endswith("/auth-check/write"):
            self.hub.requests.append(f"{self.command} {self.path}")
            return self._if_allowed(
                path.removeprefix("/api/models/").split("/auth-check")[0], self.send_json, {}
            )
        if "/discussions/" in path:
            return self._describe_pull_request(*path.removeprefix("/api/models/").split("/discussions/"))
        super().do_GET()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/lfs/"):
            return self._join(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            if self._name() is None:
                return self.fail(401, "", "Invalid username or password.")
            return self._offer(json.loads(body)["objects"])  # for a proposal, perhaps
        found = self._split(path.removeprefix("/api/models").strip("/"))
        if found is None:
            return self.fail(404, "RepoNotFound", "Repository not found")
        repo, repository, (action, *rest) = found
        is_proposal = "create_pr" in parse_qs(urlsplit(self.path).query)
        if action == "discussions":
            return self.send_json({"num": self._open_pull_request(repository)})
        if is_proposal and self._name() is not None:
            return self._answer_commit(action, repo, repository, rest[0], body, is_proposal)
        self._if_allowed(repo, self._answer_commit, action, repo, repository, rest[0], body, is_proposal)

    def do_PUT(self) -> None:
        """Of a blob, or of one part of it."""
        self.hub.requests.append(f"{self.command} {self.path}")
        _, oid, *part = urlsplit(self.path).path.strip("/").split("/")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.hangs is not None and content in self.hub.hangs:
            self.hub.hanging.set()
            self.rfile.read(1)  # until the client is gone
            self.close_connection = True
            return
        if self.hub.drops:
            self.hub.drops = False
            self.close_connection = True
            self.connection.close()
            return
        if self.hub.refuses is not None:
            return self.fail(self.hub.refuses, "", "The storage is in trouble")
        self.hub.sent.append(oid)
        if part:
            self.hub.parts[oid, int(part[0])] = content
        else:
            self.hub.blobs[oid] = content
        self.send(200, b"", {"ETag": hashlib.md5(content).hexdigest()})

    def _name(self) -> str | None:
        return self.hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _if_allowed(self, repo: str, then: Any, *arguments: Any) -> None:
        name = self._name()
        if name is None:
            return self.fail(401, "", "Invalid username or password.")
        if repo.split("/")[0] != name:
            return self.fail(403, "", f"You don't have the rights to write under {repo.split('/')[0]!r}")
        then(*arguments)

    def _validate(self, card: str) -> None:
        """Of a head's many rules, one: that datasets have ids."""
        head = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---") else {}
        errors = [{"message": f'"{name}" is no id'} for name in head.get("datasets", []) if " " in name]
        answer = json.dumps({"errors": errors, "warnings": []}).encode()
        self.send(400 if errors else 200, answer, {"Content-Type": "application/json"})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization'] or self._name()}/{asked['name']}"
        there = {"url": f"{self.hub.url}/{repo}", "error": "You already created this model repo"}
        if repo in self.hub.repositories and self._name() is not None:
            return self.send(409, json.dumps(there).encode(), {"Content-Type": "application/json"})
        self._if_allowed(repo, self._make, repo, asked.get("visibility") == "private", there)

    def _make(self, repo: str, private: bool, answer: dict[str, str]) -> None:
        revision = _revision({".gitattributes": b""})
        self.hub.repositories[repo] = Repository({"main": revision}, private=private)
        self.send_json(answer)

    def _offer(self, objects: list[dict[str, Any]]) -> None:
        """Where to send each, of those that have not arrived."""
        self.send_json({"transfer": "basic", "objects": [self._offered(**each) for each in objects]})

    def _offered(self, oid: str, size: int) -> dict[str, Any]:
        found = {"oid": oid, "size": size}
        if oid in self.hub.blobs:
            return found
        href, chunk = f"{self.hub.url}/lfs/{oid}", self.hub.chunk
        upload: dict[str, Any] = {"href": href}
        if chunk is not None and size > chunk:
            numbers = range(1, -(-size // chunk) + 1)
            upload["header"] = {"chunk_size": str(chunk), **{str(n): f"{href}/{n}" for n in numbers}}
        return {**found, "actions": {"upload": upload}}

    def _join(self, asked: dict[str, Any]) -> None:
        oid = asked["oid"]
        numbers = [part["partNumber"] for part in asked["parts"]]
        self.hub.blobs[oid] = b"".join(self.hub.parts[oid, number] for number in numbers)
        self.send_json({})

    def _answer_commit(
        self, action: str, repo: str, repository: Repository, name: str, body: bytes, is_proposal: bool
    ) -> None:
        match action:
            case "branch":
                there = name in repository.revisions
                repository.revisions.setdefault(name, repository.revisions["main"])
                return self.fail(409, "", "Reference already exists") if there else self.send_json({})
            case "preupload":
                before = repository.revisions["main" if is_proposal else name].files
                return self.send_json(
                    {"files": [self._mode(each, before) for each in json.loads(body)["files"]]}
                )
            case "commit":
                if is_proposal:
                    name = f"refs/pr/{self._open_pull_request(repository)}"
                return self._commit(repo, repository, name, body)
        self.fail(404, "EntryNotFound", "No such route")

    def _mode(self, file: dict[str, Any], before: dict[str, bytes]) -> dict[str, Any]:
        path = file["path"]
        is_large = any(fnmatch.fnmatch(path, pattern) for pattern in self.hub.large)
        content = before.get(path)
        oid = None if content is None else sha256(content) if is_large else _git_oid(content)
        return {
            "path": path,
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def _open_pull_request(self, repository: Repository) -> int:
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.revisions)
        repository.revisions[f"refs/pr/{number}"] = repository.revisions["main"]
        return number

    def _describe_pull_request(self, repo: str, number: str) -> None:
        self.send_json(
            {
                "title": "", "num": int(number), "author": {"name": self._name()},
                "createdAt": "2026-01-01T00:00:00.000Z", "status": "draft", "isPullRequest": True, "events": [],
                "repo": {"name": repo, "type": "model"}, "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
            }
        )  # fmt: skip

    def _commit(self, repo: str, repository: Repository, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        files = dict(repository.revisions[name].files)
        added, deleted = set(), set()
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            match line["key"]:
                case "file":
                    files[path] = base64.b64decode(value["content"])
                    added.add(path)
                case "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        return self.fail(400, "", f"{path}: its bytes have not arrived")
                    files[path] = self.hub.blobs[value["oid"]]
                    added.add(path)
                case "deletedFile":
                    del files[path]
                    deleted.add(path)
        revision = repository.revisions[name] = _revision(files)
        self.hub.commits.append(
            Commit(repo, name, header["summary"], header["description"], frozenset(added), frozenset(deleted))
        )
        self.send_json(
            {
                "commitUrl": f"{self.hub.url}/{repo}/commit/{revision.commit}",
                "commitOid": revision.commit,
                "pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{name.rpartition('/')[2]}",
            }
        )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _revision(files: dict[str, bytes]) -> Revision:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content)
    return Revision(digest.hexdigest(), files)
