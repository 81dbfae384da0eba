"""What `test_hub.py` runs in a process of its own: a model pushed in every form, and what is loaded again.

python push_a_model.py <base> <folder>      prints JSON
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxtune import FastLanguageModel
from jaxtune.errors import HubError


def main(base: str, folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(base, dtype="float32", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    rng = np.random.default_rng(0)
    model.lora = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(np.float32), model.lora)
    prompt = np.arange(5, 25)[None]
    logits = np.asarray(model.apply(model.params, model.lora, prompt))

    model.push_to_hub("me/adapter", tokenizer, private=True, tags=["mine"], commit_message="Adapter")
    for message in ("Merged", "Merged again"):
        model.push_to_hub_merged("me/merged", tokenizer, max_shard_size="300KB", commit_message=message)
    model.push_to_hub_gguf("me/gguf", tokenizer, quantization_method=["q8_0", "f16"], commit_message="GGUF")
    model.push_to_hub_ggml("me/ggml", tokenizer, quantization_method="q8_0", commit_message="GGML")
    model.save_pretrained_merged(folder / "kept", tokenizer, save_method="lora", push_to_hub=True)
    try:
        model.push_to_hub_merged("me/adapter", tokenizer)
        refused = ""
    except HubError as error:
        refused = error.found

    far = {}
    for name in ("me/adapter", "me/merged"):
        again, _ = FastLanguageModel.from_pretrained(name, dtype="float32", load_in_4bit=False)
        far[name] = float(abs(np.asarray(again.apply(again.params, again.lora, prompt)) - logits).max())
    print(json.dumps({"far": far, "refused": refused}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
