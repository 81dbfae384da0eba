"""What a model can be saved as: an adapter, a merged folder, GGUF. The methods of LanguageModel that write."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtune.export.gguf.calibration import save_imatrix
from jaxtune.export.hub import save
from jaxtune.options import ANY, mirrors
from jaxtune.outputs import Names, Outputs, Saved

ADAPTER_WITHOUT_EFFECT = {"safe_serialization": (True, None), "is_main_process": True}
MERGE_WITHOUT_EFFECT = {
    **ADAPTER_WITHOUT_EFFECT,
    "state_dict": None,
    "save_function": ANY,
    "variant": None,
    "save_peft_format": ANY,
    "temporary_location": ANY,
    "maximum_memory_usage": ANY,
}
GGUF_WITHOUT_EFFECT = {
    **MERGE_WITHOUT_EFFECT,
    "max_shard_size": ANY,
    "first_conversion": ANY,
    "merge_is_disposable": ANY,
}


class Exportable(Saved):
    """A model's methods that write."""

    @mirrors(ADAPTER_WITHOUT_EFFECT)
    def save_pretrained(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> None:
        """Writes the adapter as a PEFT folder. A model without one is written whole, as transformers would: packed
        weights as a bitsandbytes checkpoint, others as the original's.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None saves none.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            token: The hub's.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the folder back, and compare it with what was to be written, before it bears its name.
        """
        outputs = Outputs(model=self, tokenizer=tokenizer, tags=tags, datasets=datasets, verify=verify)
        save(outputs.adapter(), save_directory, push_to_hub, repo_id, token, private)

    @mirrors(MERGE_WITHOUT_EFFECT)
    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str = "5GB",
        token: str | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> None:
        """Writes the original weights with the adapter merged in, as a Hugging Face folder. What a 4-bit model was
        trained on differs from its merge by NF4's error.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None copies the original's files.
            save_method: "merged_16bit"; "merged_4bit", which quantises the merge as a bitsandbytes checkpoint (as
                "merged_4bit_forced" does); "fp8_dynamic" ("fp8"), "w8a16" or "w4a16", which quantise it as a
                compressed-tensors checkpoint, for vLLM; or "lora", which writes the adapter alone.
            max_shard_size: The most that one file of weights holds.
            token: The hub's, to push, and to fetch original weights that are gated.
            original_model: What a base that is quantised itself was made from, an id or a folder; None finds it.
            dequantize: Merge into the weights of such a base as they are.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the folder back, compare its bytes with what was written and its layers with the base's and the
                adapter beside it, before it bears its name.
        """
        outputs = Outputs(
            model=self, tokenizer=tokenizer, tags=tags, datasets=datasets, verify=verify,
            token=token, original_model=original_model, dequantize=dequantize,
        )  # fmt: skip
        output = outputs.merged(save_method, max_shard_size)
        save(output, save_directory, push_to_hub, repo_id, token, private)

    @mirrors(GGUF_WITHOUT_EFFECT)
    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] | None = "fast_quantized",
        imatrix_file: str | Path | None = None,
        max_shard_size: int | str | None = None,
        token: str | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        save_method: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> list[Path]:
        """Writes `<save_directory>_gguf/`: the merged model as GGUF, a file for each method that was asked for, and a
        Modelfile for Ollama.

        Args:
            save_directory: The folder's name, without its ending.
            tokenizer: Whose vocabulary and template the file has; None is the one loaded with the model.
            quantization_method: One of llama.cpp's ("q4_k_m", "q8_0", "f16", ...: docs/export.md), or several;
                "fast_quantized" is q8_0.
            imatrix_file: What save_imatrix or llama-imatrix measured with the model; methods of few bits need it, and
                all others lose less with it.
            max_shard_size: The most that one file holds, such as "20GB"; None is one file for each method, which is
                what Ollama reads.
            token: The hub's, to push, and to fetch original weights that are gated.
            original_model: As in save_pretrained_merged.
            dequantize: Likewise.
            save_method: "lora" writes the adapter alone, as save_pretrained_ggml does; None, or "merged_16bit", the
                merged model.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the files back, and compare them with what they were made of, before they bear their names.
        """
        outputs = Outputs(
            model=self, tokenizer=tokenizer, tags=tags, datasets=datasets, verify=verify,
            token=token, original_model=original_model, dequantize=dequantize,
        )  # fmt: skip
        output = outputs.gguf(quantization_method, imatrix_file, save_method, max_shard_size)
        return save(output, save_directory, push_to_hub, repo_id, token, private)

    @mirrors(GGUF_WITHOUT_EFFECT)
    def save_pretrained_ggml(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str = "f16",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> list[Path]:
        """Writes the adapter alone as GGUF, which llama.cpp adds to a GGUF of the base (`--lora`).

        Args:
            save_directory: The folder.
            tokenizer: Whose template the Modelfile has; None is the one loaded with the model.
            quantization_method: "f32", "f16", "bf16", "q8_0", or "auto", which is f16.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            token: The hub's.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the file back, and compare it with the adapter, before it bears its name.
        """
        outputs = Outputs(model=self, tokenizer=tokenizer, tags=tags, datasets=datasets, verify=verify)
        output = outputs.gguf_adapter(quantization_method)
        return save(output, save_directory, push_to_hub, repo_id, token, private)

    def save_lora(self, save_directory: str | Path, tokenizer: Any = None) -> None:
        """Writes the adapter as a PEFT folder, for `load_lora` and everyone else."""
        self.require_adapter()
        self.save_pretrained(save_directory, tokenizer)

    def save_imatrix(
        self, file: str | Path, texts: str | Iterable[str], tokenizer: Any = None, context: int = 512
    ) -> None:
        """Measures how much each column of the weights matters, on text like that which the model will see, and writes
        it as llama.cpp's tools do: an `imatrix_file` of save_pretrained_gguf.

        Args:
            file: What is written, such as "imatrix.gguf".
            texts: The text; some tens of thousands of tokens do.
            tokenizer: Whose tokens the text is made of; None is the one loaded with the model.
            context: How many tokens the model sees at once.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        save_imatrix(file, self.causal_lm, self.params, self.lora, texts, tokenizer, context=context)
