"""Sending a folder to the Hugging Face hub.

Whether that can succeed is asked before anything is written: the token, the right to write, what the repository holds.
What the hub already has by its content is not sent again, so a push that broke off goes on where it was: written once
more, the files are the same to the byte.
"""

import dataclasses
import glob
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import HubError, OptionError, OutputFolderError
from jaxtune.export.card import CARD_FILE, is_ours
from jaxtune.folders import cannot_write, named
from jaxtune.loading.hub import could_be_hub_id, endpoint, one_line
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

log = get_logger(__name__)

CLOCK = 2.0
"""Seconds by which a file system's clock may be behind."""


@dataclasses.dataclass(frozen=True)
class Output:
    """One kind of folder."""

    write: Callable[[Path, str], list[Path]]
    """Given where, and what its card calls it. Gives the files that matter, which lie in the folder that it made."""
    beside: str | None = None
    """The file of another kind of folder, with which this one can't live together."""
    replaces: Sequence[str] = ()
    """Patterns of files that an earlier push may have left, and that would be loaded in place of these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    repo_id: str
    """The repository's id on the hub, which is made unless it is there; without a namespace, in the token's own."""
    token: str | bool | None = None
    """The hub's, with the right to write; None is huggingface_hub's own."""
    private: bool | None = None
    """Whether a repository that is made is private; None is what its owner has set."""
    revision: str | None = None
    """A branch, made unless it is there, or an open pull request's "refs/pr/N"; None is main."""
    create_pr: bool = False
    """Open a pull request instead of writing to main."""
    commit_message: str | None = None
    """The commit's first line; None says that the model was trained with jaxtune."""
    commit_description: str | None = None
    """What else the commit, or the pull request, says."""

    def __post_init__(self):
        if not isinstance(self.repo_id, str) or not could_be_hub_id(self.repo_id):
            raise OptionError(
                f"The hub cannot call a repository {str(self.repo_id)!r}.",
                expected='an id such as "name/model": letters, digits, "-", "_" and ".".',
                fix="Pass such a repo_id.",
            )
        if self.create_pr and self.revision not in (None, "main"):
            raise OptionError(
                f"create_pr=True and revision={self.revision!r}.",
                expected="one of them: a new pull request is one to main.",
                fix="Leave create_pr out to push to that revision, or revision to open a pull request.",
            )

    def alone(self, output: Output, place: str | Path | None = None) -> "CommitInfo":
        """Writes to a temporary folder, which lies in `place`, or where the system has such."""
        repo_id = self._open(output.beside)
        place = Path(tempfile.gettempdir() if place is None else place)
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="jaxtune-push-", dir=place) as temporary:
                log.info("What is pushed to %s is written to %s first.", repo_id, temporary)
                files = output.write(Path(temporary) / repo_id.rpartition("/")[2], repo_id)
                return self._send(files[0].parent, repo_id, output.replaces, "*")
        except OSError as error:
            raise cannot_write(place, error) from error
        except OutputFolderError as error:
            error.fix += " Or pass temporary_location=, a folder on a disk with more room."
            raise

    def also(self, output: Output, folder: Path) -> list[Path]:
        """Writes to a folder that is kept, and sends what was written. Gives the files that matter."""
        repo_id = self._open(output.beside)
        before = time.time() - CLOCK
        files = output.write(folder, repo_id)
        folder = files[0].parent
        new = [file.name for file in folder.iterdir() if file.is_file() and file.stat().st_mtime >= before]
        self._send(folder, repo_id, output.replaces, [glob.escape(name) for name in new])
        return files

    def _open(self, beside: str | None) -> str:
        """Makes the repository and the branch unless they are there, and raises if they can't be written. Gives the
        repository's whole id."""
        hub = self._hub()
        try:
            repo_id = hub.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if not self.create_pr:
                hub.auth_check(repo_id, write=True)
            if self.revision is not None and not self.revision.startswith("refs/"):
                hub.create_branch(repo_id, branch=self.revision, exist_ok=True)
            files = hub.list_repo_files(repo_id, revision=self.revision)
        # The client's errors and its HTTP library's have no base in common but this.
        except Exception as error:
            raise self._explain(error, begun=False) from error
        if beside in files:
            raise HubError(
                f"The hub's {repo_id!r} holds {beside}.",
                expected="a repository of its own for an adapter and for a model: whoever loads one that has both gets "
                "the adapter.",
                fix="Choose another repo_id, or a revision for this one.",
            )
        return repo_id

    def _send(
        self, folder: Path, repo_id: str, replaces: Sequence[str], files: str | list[str]
    ) -> "CommitInfo":
        """A repository's card that we did not write stays. `files` are patterns."""
        hub = self._hub()
        try:
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=self.revision,
                create_pr=self.create_pr,
                commit_message=self.commit_message or "Trained with jaxtune",
                commit_description=self.commit_description,
                allow_patterns=files,
                ignore_patterns=None if self._may_write_card(hub, repo_id) else [CARD_FILE],
                delete_patterns=list(replaces) or None,
            )
        except Exception as error:
            raise self._explain(error, begun=True) from error
        log.info("Pushed to %s", commit.pr_url or commit.commit_url)
        return commit

    def _hub(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=self.token)

    def _may_write_card(self, hub: Any, repo_id: str) -> bool:
        from huggingface_hub.errors import EntryNotFoundError

        with tempfile.TemporaryDirectory() as folder:
            try:
                path = hub.hf_hub_download(repo_id, CARD_FILE, revision=self.revision, local_dir=folder)
            except EntryNotFoundError:
                return True
            return is_ours(Path(path))

    def _explain(self, error: Exception, *, begun: bool) -> HubError:
        """Which of the reasons why a push fails `error` stands for."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        # Of a file among many, it is the cause that tells.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        said = getattr(cause, "server_message", None) or one_line(cause)
        if isinstance(cause, ValueError):  # what a card's head may not say, line by line
            said = " ".join(str(cause).split())
        if isinstance(cause, OfflineModeIsEnabled):
            return HubError(
                f"{self.repo_id!r} cannot be pushed: HF_HUB_OFFLINE forbids asking the hub.",
                expected="a hub that may be asked.",
                fix="Leave HF_HUB_OFFLINE out; or save to a folder, and upload that later.",
            )
        if status == 401:
            return HubError(
                f"The hub at {endpoint()} does not know who pushes to {self.repo_id!r} (HTTP 401: {said}).",
                expected="a valid token with the right to write.",
                fix="Run `hf auth login`, or correct HF_TOKEN or token=.",
            )
        if status in (403, 404):
            return HubError(
                f"The hub at {endpoint()} does not let this token write to {self.repo_id!r} (HTTP {status}: {said}).",
                expected="a repository of your own, or of an organisation in which you may write.",
                fix="Correct repo_id (without a namespace it is your own), take a token of the kind that writes, or "
                "pass create_pr=True to propose it.",
            )
        if status is None and not begun:
            return HubError(
                f"The hub at {endpoint()} gives no answer: {said}.",
                expected="a hub that answers.",
                fix="Check the network, the proxy and HF_ENDPOINT; or save to a folder, and upload that later.",
            )
        http = "" if status is None else f"HTTP {status}: "
        return HubError(
            f"The push to {self.repo_id!r} broke off: {http}{said}.",
            expected="all files on the hub.",
            fix="Push again: what has arrived is not sent twice.",
        )


def save(
    output: Output,
    folder: str | Path,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | None = None,
    private: bool | None = None,
) -> list[Path]:
    """Into a folder, and to the hub as well if that is asked for. As in Unsloth, the folder's name is the repository's
    id if it could be one; else its last part is. Gives the files that matter."""
    path = named(folder)
    if not push_to_hub:
        return output.write(path, path.name)
    default = str(folder) if could_be_hub_id(str(folder)) else path.name
    return Push(repo_id=repo_id or default, token=token, private=private).also(output, path)
