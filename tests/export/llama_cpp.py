"""The real llama.cpp, through the xllamacpp package: what it makes of a GGUF file of ours.

Each server is a process of its own. In ours it would be joined when it is let go of, and once in some hundred times it
waits then for a connection that nobody makes.
"""

import json
import os
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

_SECONDS = 120
"""For one request."""


class LlamaCpp:
    """One loaded file, or with an adapter two. The cache is float32 and attention plain, so that what is compared is
    the files."""

    def __init__(self, path: Path, adapter: Path | None = None, template: str | None = None):
        """`template` is used in place of the file's."""
        asked = {"path": str(path), "adapter": adapter and str(adapter), "template": template}
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(asked)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        self.address = process.stdout.readline().strip()
        assert self.address, f"llama.cpp did not load {path}"

    def next_logits(self, ids: list[int], vocab_size: int, printable: int) -> np.ndarray:
        """The logits after `ids`, up to a constant, [vocab_size].

        Its reply has them only if the chosen token prints, so the choice is forced to `printable`; what it reports is
        from before that."""
        reply = self._ask("v1/completions", {
            "prompt": ids, "n_predict": 1, "n_probs": vocab_size, "temperature": 0, "cache_prompt": False,
            "post_sampling_probs": False, "logit_bias": [[printable, 1000.0]],
        })  # fmt: skip
        logits = np.full(vocab_size, np.nan)
        for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logits[entry["id"]] = entry["logprob"]
        assert not np.isnan(logits).any(), "llama.cpp left tokens out"
        return logits

    def answer(self, messages: list[dict], max_tokens: int) -> str:
        """What its chat endpoint says, by the template in the file."""
        request = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "cache_prompt": False}
        return self._ask("v1/chat/completions", request)["choices"][0]["message"]["content"]

    def prompt(self, messages: list[dict]) -> str:
        """What the template makes of a conversation."""
        return self._ask("apply-template", {"messages": messages})["prompt"]

    def tokenize(self, text: str) -> list[int]:
        return self._ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def _ask(self, what: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}/{what}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return json.load(reply)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def _serve(path: str, adapter: str | None, template: str | None) -> None:
    """Says where it listens, and does so until whoever started it is gone."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    if adapter is not None:
        added = xllamacpp.CommonAdapterLoraInfo()
        added.path, added.scale = adapter, 1.0
        params.lora_adapters = [added]
    if template is not None:
        params.chat_template = template
    params.use_jinja = True
    params.n_ctx = 256
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
