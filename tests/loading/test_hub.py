"""Finding a model: a folder as it is, a hub id through the cache, and one clear error for each way it can fail.

Each case with a hub id runs the real huggingface_hub in a process of its own, against a hub on this machine.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.errors import ModelNotFoundError
from jaxtune.loading.hub import resolve
from tests.kit.hub import FakeHub

REPOSITORY_ROOT = Path(__file__).parents[2]
ID = "org/tiny"

RESOLVE = """
import json, sys
from jaxtune.errors import JaxtuneError
from jaxtune.loading.hub import resolve

try:
    print(json.dumps({"folder": str(resolve(**json.loads(sys.argv[1])))}))
except JaxtuneError as error:
    print(json.dumps({"error": type(error).__name__, "found": error.found, "fix": error.fix}))
"""


def resolve_elsewhere(environment: dict[str, str], name: str = ID, **options: str) -> dict[str, str]:
    """`resolve` in a process with this environment: {"folder"}, or {"error", "found", "fix"}."""
    arguments = json.dumps({"name_or_path": name, **options})
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", RESOLVE, arguments],
        env=environment,
        cwd=REPOSITORY_ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": np.arange(50_000, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf-home"


@pytest.fixture
def hub(model: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add(ID, model)
        yield hub


def files_under(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


class TestFolders:
    def test_an_existing_folder_is_returned_as_is(self, model: Path):
        assert resolve(model) == model
        assert resolve(str(model)) == model

    def test_a_tilde_means_the_home_folder(self, model: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(model.parent))
        assert resolve("~/model") == model

    def test_a_folder_wins_over_a_hub_id_of_the_same_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "org/tiny").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve(ID) == Path(ID)

    @pytest.mark.parametrize(
        "name",
        ["/no/such/model", "./model", "../model", "~/no-such-model", "a/b/c", "a model", "", "models/"],
    )
    def test_what_can_only_be_a_path_and_is_not_there_is_named(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelNotFoundError) as caught:
            resolve(name)
        assert repr(name) in caught.value.found

    def test_a_mistyped_folder_is_suggested(self, model: Path):
        with pytest.raises(ModelNotFoundError, match="Did you mean 'model'"):
            resolve(model.parent / "modle")

    def test_a_file_is_not_a_model(self, model: Path):
        with pytest.raises(ModelNotFoundError) as caught:
            resolve(model / "model.safetensors")
        assert "is a file" in caught.value.found and str(model) in caught.value.fix


class TestDownloads:
    def test_a_hub_id_is_fetched_into_the_cache_and_found_there_offline(self, hub: FakeHub, home: Path):
        folder = Path(resolve_elsewhere(hub.environment(home))["folder"])
        assert files_under(folder) == {"config.json", "model.safetensors"}
        assert folder.is_relative_to(home)

        asked = len(hub.requests)
        offline = resolve_elsewhere(hub.environment(home, HF_HUB_OFFLINE="1"))
        assert Path(offline["folder"]) == folder
        assert len(hub.requests) == asked

    def test_what_is_in_the_cache_serves_while_the_hub_is_in_trouble(self, hub: FakeHub, home: Path):
        before = resolve_elsewhere(hub.environment(home))
        hub.refuse(ID, 503)
        assert resolve_elsewhere(hub.environment(home)) == before

    def test_only_what_is_used_is_fetched(self, hub: FakeHub, home: Path, model: Path):
        (model / "original").mkdir()
        unwanted = [
            "pytorch_model.bin",
            "run.py",
            "consolidated.safetensors",
            "tekken.json",
            "original/params.json",
        ]
        for name in unwanted:
            (model / name).write_text("{}")
        (model / "chat_template.jinja").write_text("{{ messages }}")
        hub.add(ID, model)

        folder = Path(resolve_elsewhere(hub.environment(home))["folder"])
        assert files_under(folder) == {"config.json", "model.safetensors", "chat_template.jinja"}
        assert not [request for request in hub.requests for name in unwanted if request.endswith(name)]

    def test_a_revision_is_fetched(self, hub: FakeHub, home: Path, model: Path):
        (model / "config.json").write_text('{"model_type": "qwen3"}')
        commit = hub.add(ID, model, revision="refs/pr/1")
        folder = Path(resolve_elsewhere(hub.environment(home), revision="refs/pr/1")["folder"])
        assert folder.name == commit
        assert "qwen3" in (folder / "config.json").read_text()

    def test_a_gated_model_is_fetched_with_a_token(self, hub: FakeHub, home: Path):
        hub.gate(ID, token="hf_secret")
        assert "folder" in resolve_elsewhere(hub.environment(home), token="hf_secret")

    def test_a_cache_of_ones_own_serves_alone(self, hub: FakeHub, home: Path):
        mine = {"cache_dir": str(home / "mine")}
        folder = resolve_elsewhere(hub.environment(home), **mine)["folder"]
        assert Path(folder).is_relative_to(home / "mine")
        asked = len(hub.requests)
        assert resolve_elsewhere(hub.environment(home), **mine, local_files_only=True)["folder"] == folder
        assert len(hub.requests) == asked


class TestFailures:
    def test_local_files_only_and_not_cached(self, hub: FakeHub, home: Path):
        answer = resolve_elsewhere(hub.environment(home), local_files_only=True)
        assert answer["error"] == "ModelNotFoundError"
        assert "local_files_only=True forbids" in answer["found"] and "HF_HUB" not in answer["fix"]
        assert hub.requests == []

    def test_offline_and_not_cached(self, hub: FakeHub, home: Path):
        answer = resolve_elsewhere(hub.environment(home, HF_HUB_OFFLINE="1"))
        assert answer["error"] == "ModelNotFoundError"
        assert ID in answer["found"] and "HF_HUB_OFFLINE" in answer["found"]
        assert hub.requests == []

    def test_an_unknown_id(self, hub: FakeHub, home: Path):
        answer = resolve_elsewhere(hub.environment(home), name="org/tinny")
        assert answer["error"] == "ModelNotFoundError"
        assert "no folder 'org/tinny'" in answer["found"] and hub.url in answer["found"]
        assert "spelling" in answer["fix"]

    def test_an_unknown_revision(self, hub: FakeHub, home: Path):
        answer = resolve_elsewhere(hub.environment(home), revision="v9")
        assert answer["error"] == "ModelNotFoundError"
        assert "no revision 'v9'" in answer["found"]

    def test_a_gated_model_without_access(self, hub: FakeHub, home: Path):
        hub.gate(ID, token="hf_secret")
        answer = resolve_elsewhere(hub.environment(home), token="hf_other")
        assert answer["error"] == "ModelNotFoundError"
        assert "gated" in answer["found"]
        assert f"{hub.url}/{ID}" in answer["fix"] and "hf auth login" in answer["fix"]

    @pytest.mark.parametrize(
        "status, said, advice",
        [
            (401, "refused access", "HF_TOKEN"),
            (403, "refused access", "HF_TOKEN"),
            (500, "no answer", "HF_ENDPOINT"),
        ],
    )
    def test_a_hub_that_refuses(self, status: int, said: str, advice: str, hub: FakeHub, home: Path):
        hub.refuse(ID, status)
        answer = resolve_elsewhere(hub.environment(home))
        assert answer["error"] == "ModelNotFoundError"
        assert said in answer["found"] and str(status) in answer["found"]
        assert advice in answer["fix"]

    def test_a_cache_that_cannot_be_written(self, hub: FakeHub, model: Path):
        answer = resolve_elsewhere(hub.environment(model / "config.json" / "no-folder"))
        assert answer["error"] == "ModelNotFoundError"
        assert "could not be stored in the cache" in answer["found"]
        assert "HF_HOME" in answer["fix"]

    def test_a_hub_that_is_not_there(self, model: Path, home: Path):
        with FakeHub() as hub:
            environment = hub.environment(home)
        answer = resolve_elsewhere(environment)
        assert answer["error"] == "ModelNotFoundError"
        assert "gives no answer" in answer["found"] and hub.url in answer["found"]
        assert "HF_ENDPOINT" in answer["fix"]

    def test_a_connection_that_drops_mid_file_leaves_nothing_under_the_final_name(
        self, hub: FakeHub, home: Path
    ):
        hub.break_midway(ID, "model.safetensors")
        answer = resolve_elsewhere(hub.environment(home))
        assert answer["error"] == "ModelNotFoundError"
        assert "could not be fetched whole" in answer["found"]

        shard = hub.repositories[ID].revisions["main"].files["model.safetensors"]
        kept = [path for path in home.rglob("*") if path.is_file()]
        assert "model.safetensors" not in {path.name for path in kept}
        assert not [
            path for path in kept if path.name != "config.json" and path.read_bytes()[:64] == shard[:64]
        ]
        # And the half that is there is not taken for the model later.
        assert "error" in resolve_elsewhere(hub.environment(home, HF_HUB_OFFLINE="1"))

    @pytest.mark.parametrize(
        "weights, named", [("pytorch_model.bin", "pickles"), ("tiny-Q4_K_M.gguf", "GGUF")]
    )
    def test_weights_in_another_form_only(
        self, weights: str, named: str, hub: FakeHub, home: Path, model: Path
    ):
        (model / "model.safetensors").rename(model / weights)
        hub.add(ID, model)
        answer = resolve_elsewhere(hub.environment(home))
        assert answer["error"] == "CheckpointError"
        assert named in answer["found"] and weights in answer["found"]

    def test_a_folder_without_any_weights_still_serves_its_config(
        self, hub: FakeHub, home: Path, model: Path
    ):
        (model / "model.safetensors").unlink()
        hub.add(ID, model)
        assert files_under(Path(resolve_elsewhere(hub.environment(home))["folder"])) == {"config.json"}


def test_importing_it_does_not_import_the_hub_client():
    code = "import sys, jaxtune.loading.hub; sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY_ROOT).returncode == 0


def test_all_but_the_weights(hub: FakeHub, home: Path) -> None:
    found = resolve_elsewhere(hub.environment(home), weights=False)
    assert files_under(Path(found["folder"])) == {"config.json"}
    assert not any("safetensors" in request for request in hub.requests)
