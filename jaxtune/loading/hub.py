"""From what the user calls a model (a folder, or an id on the Hugging Face hub) to a local folder.

Downloads are huggingface_hub's: its cache, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they
mean there. It writes each file under a temporary name and renames it once complete: a broken download leaves
nothing under a final name. What it raises becomes a `ModelNotFoundError` that says which reason it was.
"""

import os
from pathlib import Path

from jaxtune.errors import JaxtuneError, ModelNotFoundError, nearest
from jaxtune.loading.checkpoint import foreign_weights

WEIGHTS = "*.safetensors"
# Configs, tokenizers, templates, safetensors and the model card; nothing that could run code.
WANTED = ("*.json", WEIGHTS, "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md")
# Subfolders hold other formats of the same weights (onnx/, original/); Mistral's repositories have a second
# copy of them all in one file, and a second tokenizer.
UNWANTED = ("*/*", "consolidated*.safetensors", "tekken.json")


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The model's local folder: `name_or_path` if it is one, else the hub's model of that id, fetched; without its
    weights if these are not wanted."""
    name = str(name_or_path)
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():  # an empty name would be the current folder
        return path
    if name and path.exists():
        raise ModelNotFoundError(
            f"{path} is a file.",
            expected="A folder that holds config.json and safetensors, or a hub id such as 'org/name'.",
            fix=f"Pass the folder: {str(path.parent)!r}.",
        )
    if isinstance(name_or_path, Path) or not could_be_hub_id(name):
        raise _no_such_folder(name, path)
    wanted = [form for form in WANTED if weights or form != WEIGHTS]
    folder = _download(name, revision, token, cache_dir, local_files_only, wanted)
    if weights:
        _require_loadable_weights(folder, name, token)
    return folder


def could_be_hub_id(name: str) -> bool:
    """Whether it has the form of one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.startswith((".", "~", "/", "\\")) or name.count("/") > 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _no_such_folder(name: str, path: Path) -> ModelNotFoundError:
    siblings = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    return ModelNotFoundError(
        f"There is no folder {name!r} (looked at {path.absolute()}), and it is no hub id either.",
        expected="A folder that holds a model, or a hub id such as 'org/name'.",
        fix="Check the path." + nearest(path.name, siblings),
    )


def _download(
    repo: str,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    wanted: list[str],
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=wanted,
            ignore_patterns=list(UNWANTED),
        )
    # The client's errors, its HTTP library's and its transfer library's have no base in common but this.
    except Exception as error:
        raise _explain(error, repo, revision, local_files_only) from error
    return Path(folder)


def _require_loadable_weights(folder: Path, repo: str, token: str | None) -> None:
    """Pickles and GGUF are not fetched, so `Checkpoint` could not say that the weights are in those."""
    if any(folder.glob("*.safetensors")):
        return
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(repo, revision=folder.name, token=token)
    except Exception:
        # Offline, say. The folder still serves for its config or tokenizer; Checkpoint says what is missing.
        return
    if error := foreign_weights(f"The hub's {repo!r}", files):
        raise error


def _explain(
    error: Exception, repo: str, revision: str | None, local_files_only: bool = False
) -> JaxtuneError:
    """Which of the reasons why a model cannot be fetched `error` stands for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # When the hub gives no answer, huggingface_hub looks in its cache and reports what is missing there; why
    # it had to is the error's cause.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, GatedRepoError):
        return _gated(repo)
    if isinstance(cause, RevisionNotFoundError):
        return _no_revision(repo, revision)
    if isinstance(cause, RepositoryNotFoundError):
        return _no_repository(repo)
    if isinstance(cause, OfflineModeIsEnabled):
        return _offline(repo, revision, "HF_HUB_OFFLINE")
    if local_files_only and isinstance(cause, LocalEntryNotFoundError):
        return _offline(repo, revision, "local_files_only=True")
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return _refused(repo, status)
    if (
        isinstance(cause, OSError) and cause.errno is not None
    ):  # the disk's; the client's own errors have no number
        return _cache_unwritable(repo, cause)
    if isinstance(error, LocalEntryNotFoundError):
        return _unreachable(repo, cause)
    return _broken_off(repo, cause)


def _gated(repo: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The hub's {repo!r} is gated, and this account has not been granted access.",
        expected="A token of an account that its owners have let in.",
        fix=f"Ask for access at {endpoint()}/{repo}; then run `hf auth login`, set HF_TOKEN or pass token=.",
    )


def _no_revision(repo: str, revision: str | None) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The hub's {repo!r} has no revision {revision or 'main'!r}.",
        expected="A branch, a tag or a full commit hash of that repository.",
        fix=f"Look at {endpoint()}/{repo}/tree/main, or leave `revision` out.",
    )


def _no_repository(repo: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"There is no folder {repo!r}, and the hub at {endpoint()} has no such model that you may see.",
        expected="An existing folder, or the id of a public model or of a private one that your token opens.",
        fix="Check the spelling; for a private model run `hf auth login`, set HF_TOKEN, or pass token=.",
    )


def _offline(repo: str, revision: str | None, by: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"There is no folder {repo!r}, the cache has no whole copy of it"
        f"{f' at revision {revision!r}' if revision else ''}, and {by} forbids asking the hub.",
        expected="A folder, or a model that has been downloaded before.",
        fix=f"Leave {by} out once to download it; or point HF_HOME, or cache_dir, at the cache that has it.",
    )


def _refused(repo: str, status: int) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The hub at {endpoint()} refused access to {repo!r} (HTTP {status}).",
        expected="A valid token that may read this model.",
        fix="Run `hf auth login`, or correct HF_TOKEN or token=; a wrong one bars even from public models.",
    )


def _cache_unwritable(repo: str, cause: OSError) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The hub's {repo!r} could not be stored in the cache: {cause}.",
        expected="A cache folder that can be written and has room for the model.",
        fix="Free space there, or point HF_HOME at another disk.",
    )


def _unreachable(repo: str, cause: BaseException) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"There is no folder {repo!r}, and the hub at {endpoint()} gives no answer: {one_line(cause)}.",
        expected="A folder, a model that has been downloaded before, or a hub that answers.",
        fix="Check the network, the proxy and HF_ENDPOINT, then try again.",
    )


def _broken_off(repo: str, cause: BaseException) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{repo!r} could not be fetched whole from {endpoint()}: {one_line(cause)}.",
        expected="Every file of the model; the files that arrived whole are kept, no partial one is.",
        fix="Check the network and HF_ENDPOINT, then try again: what has arrived is not fetched twice.",
    )


def endpoint() -> str:
    """Where the hub is: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def one_line(error: BaseException) -> str:
    """What a foreign error says first, without its full stop."""
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first_line}".removesuffix(".")
