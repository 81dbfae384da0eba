"""Pushing to the hub: what arrives, what is not sent twice, and one clear error for each way it can fail.

The real huggingface_hub runs in processes of its own, against a hub on this machine.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.errors import OptionError
from jaxtune.export.card import OURS
from jaxtune.export.hub import Push
from tests.kit import models
from tests.kit.hub_uploads import UploadHub, sha256

ROOT = Path(__file__).parents[2]
ME, ID = "hf_me", "me/tiny"
CHUNK = 70_000
BY_LFS = {"HF_HUB_DISABLE_XET": "1"}

PUSH = """
import json, shutil, sys
from pathlib import Path
from jaxtune.errors import JaxtuneError
from jaxtune.export.hub import Output, Push, save
from jaxtune.folders import cannot_write

def writer(changes):
    def write(folder, name):
        shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True)
        if changes == "full":
            raise cannot_write(folder, OSError(28, "No space left on device"))
        for file, text in changes.items():
            (folder / file).unlink() if text is None else (folder / file).write_text(text)
        return [folder / "config.json"]
    return write

answers = []
for settings in json.loads(sys.argv[2]):
    kept, place = settings.pop("kept", None), settings.pop("temporary_location", None)
    write = writer(settings.pop("changes", {}))
    output = Output(write, settings.pop("beside", None), settings.pop("replaces", ()))
    try:
        if kept:
            answers.append({"files": [str(file) for file in save(output, kept, push_to_hub=True, **settings)]})
        else:
            commit = Push(**settings).alone(output, place)
            answers.append({"url": commit.commit_url, "pr": commit.pr_url})
    except JaxtuneError as error:
        answers.append({"error": type(error).__name__, "found": error.found, "fix": error.fix})
print(json.dumps(answers))
"""


def started(hub: UploadHub, home: Path, folder: Path, *pushes: dict, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PUSH, str(folder), json.dumps(pushes)],
        env=hub.environment(home, **{"HF_TOKEN": ME, **BY_LFS, **environment}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def push(hub: UploadHub, home: Path, folder: Path, *pushes: dict, **environment: str) -> list[dict]:
    """One after the other, in one process: what each gives, or its error."""
    process = started(hub, home, folder, *pushes, **environment)
    answer, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return json.loads(answer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two files, the second in three parts."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "README.md").write_text(f"---\ntags: []\n---\n{OURS}\nThe first.")
    save_file({"a": np.arange(9_000, dtype=np.float32)}, made / "model-00001-of-00002.safetensors")
    save_file({"b": np.arange(50_000, dtype=np.float32)}, made / "model-00002-of-00002.safetensors")
    return made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with UploadHub({ME: "me", "hf_you": "you"}, chunk=CHUNK) as hub:
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_hub(hub: UploadHub, revision: str = "main", repo: str = ID) -> dict[str, bytes]:
    return {name: content for name, content in hub.files(repo, revision).items() if name != ".gitattributes"}


class TestWhatArrives:
    def test_a_private_repository_with_one_commit(self, hub: UploadHub, home: Path, folder: Path):
        """Large files by LFS, in one part and in several. A second push sends nothing, and makes no commit."""
        place = home / "place"
        settings = {"repo_id": "tiny", "private": True, "commit_message": "One", "commit_description": "Why."}
        push(hub, home, folder, settings, {"repo_id": ID, "temporary_location": str(place)})
        assert on_hub(hub) == contents(folder)
        (commit,) = hub.commits
        assert (commit.repo, commit.message, commit.description) == (ID, "One", "Why.")
        assert hub.repositories[ID].private
        small, large = (sha256((folder / f"model-0000{n}-of-00002.safetensors").read_bytes()) for n in (1, 2))
        assert sorted(hub.sent) == sorted([small, large, large, large])
        assert place.is_dir() and not list(place.iterdir())

    @pytest.mark.parametrize("by_lfs", [False, True], ids=["its own way", "LFS"])
    def test_branches_and_pull_requests(self, by_lfs: bool, home: Path, folder: Path):
        """What would be loaded in place of the new weights goes; what has not changed is not sent."""
        shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        later = {
            "changes": {shards[0]: None, shards[1]: None, "model.safetensors": "All"},
            "replaces": ["model*.safetensors"],
            "commit_description": "In one.",
        }
        with UploadHub({ME: "me"}, large=("*.safetensors",) if by_lfs else ()) as hub:
            main, _, proposal, _ = push(
                hub, home, folder,
                {"repo_id": ID},
                {"repo_id": ID, "revision": "v2", **later},
                {"repo_id": ID, "create_pr": True, **later},
                {"repo_id": ID, "revision": "refs/pr/1", "changes": {"config.json": "{}"}},
                HF_HUB_DISABLE_XET=str(int(by_lfs)),
            )  # fmt: skip
        assert (f"POST /api/models/{ID}/discussions" in hub.requests) is not by_lfs
        assert main["pr"] is None and main["url"].startswith(f"{hub.url}/{ID}/commit/")
        assert proposal["pr"] == f"{hub.url}/{ID}/discussions/1"
        assert [commit.revision for commit in hub.commits] == ["main", "v2", "refs/pr/1", "refs/pr/1"]
        assert on_hub(hub) == contents(folder)
        _, to_branch, to_proposal, _ = hub.commits
        assert to_branch.added == to_proposal.added == {"model.safetensors"}
        assert to_branch.deleted == to_proposal.deleted == set(shards)
        assert to_branch.description == "In one."
        assert on_hub(hub, "refs/pr/1")["config.json"] == b"{}"

    def test_a_kept_folder_sends_what_was_written(
        self, hub: UploadHub, home: Path, folder: Path, tmp_path: Path
    ):
        kept = tmp_path / "out" / "kept"
        (kept / "checkpoint-1").mkdir(parents=True)
        for old in (kept / "old.txt", kept / "checkpoint-1" / "state"):
            old.write_text("from before")
            os.utime(old, (0, 0))
        (answer,) = push(hub, home, folder, {"kept": str(kept)})
        assert answer["files"] == [str(kept / "config.json")]
        assert on_hub(hub, repo="me/kept") == contents(folder)
        assert (kept / "old.txt").is_file()

    def test_a_card_of_somebody_else_s_stays(self, hub: UploadHub, home: Path, folder: Path):
        ours = f"{OURS} The second."
        first, second, third = ({"README.md": text} for text in (f"{OURS} The first.", ours, "Mine."))
        push(hub, home, folder, {"repo_id": ID, "changes": first}, {"repo_id": ID, "changes": second})
        assert on_hub(hub)["README.md"].decode() == ours
        push(hub, home, folder, {"repo_id": ID, "changes": third}, {"repo_id": ID, "changes": first})
        assert on_hub(hub)["README.md"] == b"Mine."


class TestInterruptions:
    def test_a_push_that_was_killed_goes_on_where_it_was(self, hub: UploadHub, home: Path, folder: Path):
        """By files: of one that had not arrived whole, LFS sends all parts."""
        small, large = ((folder / f"model-0000{n}-of-00002.safetensors").read_bytes() for n in (1, 2))
        hub.hangs = large[2 * CHUNK :]  # the last part
        process = started(hub, home, folder, {"repo_id": ID})
        assert hub.hanging.wait(60)
        while sha256(small) not in hub.blobs:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert on_hub(hub) == {} and sorted(hub.sent) == sorted([sha256(small), *2 * [sha256(large)]])

        hub.hangs = None
        hub.sent.clear()
        push(hub, home, folder, {"repo_id": ID})
        assert hub.sent == 3 * [sha256(large)]
        assert on_hub(hub) == contents(folder)

    def test_a_connection_that_drops_once(self, hub: UploadHub, home: Path, folder: Path):
        """The client sends that part again by itself."""
        hub.drops = True
        (answer,) = push(hub, home, folder, {"repo_id": ID})
        assert "error" not in answer and on_hub(hub) == contents(folder)

    def test_a_push_that_breaks_off(self, hub: UploadHub, home: Path, folder: Path):
        hub.refuses = 400
        (answer,) = push(hub, home, folder, {"repo_id": ID})
        assert answer["error"] == "HubError" and "broke off: HTTP 400" in answer["found"]
        assert "not sent twice" in answer["fix"] and on_hub(hub) == {}


class TestRefusals:
    def test_by_the_hub(self, hub: UploadHub, home: Path, folder: Path):
        push(hub, home, folder, {"repo_id": "you/theirs"}, HF_TOKEN="hf_you")
        wrong, foreign, missing, unwritable, full, proposed, bad_card = push(
            hub, home, folder,
            {"repo_id": ID, "token": "hf_wrong"},
            {"repo_id": "you/theirs"},
            {"repo_id": "nobody/model"},
            {"repo_id": ID, "temporary_location": str(folder / "config.json" / "below")},
            {"repo_id": ID, "changes": "full"},
            {"repo_id": "you/theirs", "create_pr": True, "changes": {"config.json": "{}"}},
            {"repo_id": ID, "changes": {"README.md": "---\ndatasets:\n- my own\n---\n"}},
        )  # fmt: skip
        assert wrong["error"] == "HubError" and "HTTP 401" in wrong["found"] and "HF_TOKEN" in wrong["fix"]
        for answer in (foreign, missing):
            assert answer["error"] == "HubError" and "HTTP 403" in answer["found"]
            assert "create_pr=True" in answer["fix"]
        assert unwritable["error"] == "OutputFolderError" and "below" in unwritable["found"]
        assert "No space left" in full["found"] and "temporary_location=" in full["fix"]
        assert proposed["pr"] == f"{hub.url}/you/theirs/discussions/1"
        assert 'Invalid metadata in README.md. - "my own" is no id' in bad_card["found"]
        assert [(commit.repo, commit.revision) for commit in hub.commits] == [
            ("you/theirs", "main"), ("you/theirs", "refs/pr/1")
        ]  # fmt: skip

    def test_a_repository_of_the_other_kind(self, hub: UploadHub, home: Path, folder: Path):
        adapter = {"repo_id": ID, "changes": {"adapter_config.json": "{}"}}
        _, model = push(hub, home, folder, adapter, {"repo_id": ID, "beside": "adapter_config.json"})
        assert "holds adapter_config.json" in model["found"] and "another repo_id" in model["fix"]
        assert len(hub.commits) == 1

    def test_offline(self, hub: UploadHub, home: Path, folder: Path):
        (answer,) = push(hub, home, folder, {"repo_id": ID}, HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE" in answer["found"] and hub.requests == []

    def test_a_hub_that_is_not_there(self, home: Path, folder: Path):
        with UploadHub({}) as hub:
            pass
        (answer,) = push(hub, home, folder, {"repo_id": ID})
        assert "gives no answer" in answer["found"] and hub.url in answer["found"]

    @pytest.mark.parametrize("name", ["a b", "a/b/c", "", "./out"])
    def test_what_is_no_id(self, name: str):
        with pytest.raises(OptionError, match="cannot call a repository"):
            Push(repo_id=name)

    def test_a_pull_request_to_a_branch(self):
        with pytest.raises(OptionError, match="create_pr=True and revision='v2'"):
            Push(repo_id=ID, create_pr=True, revision="v2")


def test_a_model_in_every_form_and_loaded_again(hub: UploadHub, home: Path, tmp_path: Path):
    """What is written once more is the same to the byte: the second push of the merge has nothing to send."""
    base = models.save(models.random_llama(), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add("org/base", base)
    process = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "push_a_model.py"), "org/base", str(tmp_path)],
        env=hub.environment(home, HF_TOKEN=ME, PYTHONPATH=str(ROOT), **BY_LFS),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout.splitlines()[-1])
    assert max(answer["far"].values()) < 1e-3
    assert "holds adapter_config.json" in answer["refused"]
    assert [(commit.repo, commit.message) for commit in hub.commits] == [
        ("me/adapter", "Adapter"), ("me/merged", "Merged"), ("me/gguf", "GGUF"), ("me/ggml", "GGML"),
        ("me/kept", "Trained with jaxtune"),
    ]  # fmt: skip
    names = {repo: {*on_hub(hub, repo=repo)} for repo in hub.repositories if repo.startswith("me/")}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", *tokenizer}
    assert names["me/adapter"] == names["me/kept"] == adapter
    assert names["me/gguf"] == {"base.Q8_0.gguf", "base.F16.gguf", "Modelfile", "README.md"}
    assert names["me/ggml"] == {"base-lora.Q8_0.gguf", "Modelfile", "README.md"}
    shards = {name for name in names["me/merged"] if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert names["me/merged"] - shards == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "README.md", *tokenizer
    }  # fmt: skip
    card = on_hub(hub, repo="me/adapter")["README.md"].decode()
    for line in ("base_model: org/base", "license: mit", "- mine", "model = AutoPeft"):
        assert f"\n{line}" in card
    assert 'from_pretrained("me/adapter")' in card
    assert hub.repositories["me/adapter"].private and not hub.repositories["me/merged"].private
