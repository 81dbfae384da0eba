"""The real llama.cpp, through the xllamacpp package: what it makes of a GGUF file of ours."""

import json
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp


class LlamaCpp:
    """One loaded file, or with an adapter two. The cache is float32 and attention plain, so that what is compared is
    the files."""

    def __init__(self, path: Path, adapter: Path | None = None):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        if adapter is not None:
            added = xllamacpp.CommonAdapterLoraInfo()
            added.path, added.scale = str(adapter), 1.0
            params.lora_adapters = [added]
        params.n_ctx = 256
        params.warmup = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def next_logits(self, ids: list[int], vocab_size: int, printable: int) -> np.ndarray:
        """The logits after `ids`, up to a constant, [vocab_size].

        Its reply has them only if the chosen token prints, so the choice is forced to `printable`; what it reports is
        from before that."""
        reply = self.server.handle_completions({
            "prompt": ids, "n_predict": 1, "n_probs": vocab_size, "temperature": 0, "cache_prompt": False,
            "post_sampling_probs": False, "logit_bias": [[printable, 1000.0]],
        })  # fmt: skip
        reply = json.loads(reply) if isinstance(reply, str) else reply
        logits = np.full(vocab_size, np.nan)
        for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logits[entry["id"]] = entry["logprob"]
        assert not np.isnan(logits).any(), "llama.cpp left tokens out"
        return logits

    def answer(self, messages: list[dict], max_tokens: int) -> str:
        """What its chat endpoint says, by the template in the file."""
        request = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "cache_prompt": False}
        return self.server.handle_chat_completions(request)["choices"][0]["message"]["content"]

    def tokenize(self, text: str) -> list[int]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            data=json.dumps({"content": text, "add_special": True, "parse_special": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]
