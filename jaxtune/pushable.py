"""A model's methods that send what they write to the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.export.hub import Push
from jaxtune.exportable import (
    ADAPTER_WITHOUT_EFFECT,
    GGUF_WITHOUT_EFFECT,
    MERGE_WITHOUT_EFFECT,
    Exportable,
)
from jaxtune.options import ANY, mirrors
from jaxtune.outputs import Names, Outputs

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_ALWAYS = {"use_temp_dir": (True, None)}


class Pushable(Exportable):
    """Each writes to a temporary folder first, and gives huggingface_hub's account of the commit. `repo_id`, `token`
    and what follows it are `Push`'s."""

    @mirrors({**ADAPTER_WITHOUT_EFFECT, **_ALWAYS, "max_shard_size": ANY})
    def push_to_hub(
        self,
        repo_id: str,
        tokenizer: Any = None,
        tags: Names = None,
        datasets: Names = None,
        temporary_location: str | Path | None = None,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
    ) -> "CommitInfo":
        """Sends what `save_pretrained` writes: the adapter.

        Args:
            tokenizer: What is sent with it; None sends none.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            temporary_location: Where the temporary folder lies; None is where the system has such.
        """
        push = Push(
            repo_id=repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip
        outputs = Outputs(model=self, tokenizer=tokenizer, tags=tags, datasets=datasets)
        return push.alone(outputs.adapter(), temporary_location)

    @mirrors({**MERGE_WITHOUT_EFFECT, **_ALWAYS})
    def push_to_hub_merged(
        self,
        repo_id: str,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str = "5GB",
        tags: Names = None,
        datasets: Names = None,
        temporary_location: str | Path | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
    ) -> "CommitInfo":
        """Sends what `save_pretrained_merged` writes.

        Args:
            tokenizer: What is sent with it; None sends the original's.
            save_method: As of save_pretrained_merged.
            max_shard_size: The most that one file of weights holds.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            temporary_location: Where the temporary folder lies, which is as large as the model; None is where the
                system has such.
            original_model: As of save_pretrained_merged.
            dequantize: Likewise.
        """
        outputs = Outputs(
            model=self, tokenizer=tokenizer, tags=tags, datasets=datasets,
            token=token, original_model=original_model, dequantize=dequantize,
        )  # fmt: skip
        output = outputs.merged(save_method, max_shard_size)
        push = Push(
            repo_id=repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip
        return push.alone(output, temporary_location)

    @mirrors({**GGUF_WITHOUT_EFFECT, **_ALWAYS})
    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] | None = "fast_quantized",
        imatrix_file: str | Path | None = None,
        max_shard_size: int | str | None = None,
        save_method: str | None = None,
        tags: Names = None,
        datasets: Names = None,
        temporary_location: str | Path | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
    ) -> "CommitInfo":
        """Sends what `save_pretrained_gguf` writes.

        Args:
            tokenizer: Whose vocabulary and template the file has; None is the one loaded with the model.
            quantization_method: As of save_pretrained_gguf.
            imatrix_file: As of save_pretrained_gguf.
            max_shard_size: As of save_pretrained_gguf.
            save_method: As of save_pretrained_gguf.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            temporary_location: Where the temporary folder lies, which is as large as all files; None is where the
                system has such.
            original_model: As of save_pretrained_merged.
            dequantize: Likewise.
        """
        outputs = Outputs(
            model=self, tokenizer=tokenizer, tags=tags, datasets=datasets,
            token=token, original_model=original_model, dequantize=dequantize,
        )  # fmt: skip
        output = outputs.gguf(quantization_method, imatrix_file, save_method, max_shard_size)
        push = Push(
            repo_id=repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip
        return push.alone(output, temporary_location)

    @mirrors({**GGUF_WITHOUT_EFFECT, **_ALWAYS})
    def push_to_hub_ggml(
        self,
        repo_id: str,
        tokenizer: Any = None,
        quantization_method: str = "f16",
        tags: Names = None,
        datasets: Names = None,
        temporary_location: str | Path | None = None,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
    ) -> "CommitInfo":
        """Sends what `save_pretrained_ggml` writes.

        Args:
            tokenizer: Whose template the Modelfile has; None is the one loaded with the model.
            quantization_method: As of save_pretrained_ggml.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            temporary_location: Where the temporary folder lies; None is where the system has such.
        """
        push = Push(
            repo_id=repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip
        outputs = Outputs(model=self, tokenizer=tokenizer, tags=tags, datasets=datasets)
        return push.alone(outputs.gguf_adapter(quantization_method), temporary_location)
