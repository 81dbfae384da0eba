"""What every family's export is elsewhere: the adapter in PEFT, and the merged folder in transformers, have the logits
of our own forward pass on the same base. Each kind of training takes its turn; tests/parity/test_peft.py has them all,
on Llama."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel, add_new_tokens
from tests.kit import families, models
from tests.kit.compare import assert_close, relative_rms

IDS = np.random.default_rng(0).integers(5, models.VOCAB, (2, 24)).astype(np.int32)
NEW = ["<|tool|>", "<|/tool|>", "<|result|>"]


class Kind(NamedTuple):
    """How a model is trained."""

    settings: dict[str, Any]
    new_tokens: bool = False


WITH_ENDS = r".*(q_proj|qkv_proj|down_proj|embed_tokens|lm_head)"
RSLORA = Kind({"use_rslora": True, "rank_pattern": {"down_proj": 2}})
DORA_RSLORA = Kind({"use_dora": True, "use_rslora": True})
HEAD_RSLORA = Kind({"modules_to_save": ["lm_head"], "use_rslora": True})
BOTH_WHOLE = Kind({"modules_to_save": ["embed_tokens", "lm_head"]})
BOTH_WHOLE_DORA = Kind({"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True})
BOTH_WHOLE_TIED = Kind({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True})
BOTH_LOW_RANK = Kind({"target_modules": WITH_ENDS, "use_rslora": True})
BIASES = Kind({"bias": "all", "use_dora": True})
NEW_TOKENS = Kind({}, new_tokens=True)
NEW_TOKENS_DORA = Kind({"use_dora": True}, new_tokens=True)
NEW_TOKENS_WHOLE = Kind({"modules_to_save": ["embed_tokens", "lm_head"], "use_rslora": True}, new_tokens=True)

TABLE = {
    "llama": {"new tokens": NEW_TOKENS_WHOLE},
    "mistral, window": {"rslora, a whole head": HEAD_RSLORA},
    "qwen2": {"tied, low rank": BOTH_LOW_RANK, "tied, new tokens": NEW_TOKENS},
    "qwen3": {"dora, rslora": DORA_RSLORA},
    "gemma": {"tied, both whole, dora": BOTH_WHOLE_DORA},
    "gemma2": {"tied, new tokens, dora": NEW_TOKENS_DORA},
    "gemma3_text": {"tied, low rank": BOTH_LOW_RANK, "both whole, still tied": BOTH_WHOLE_TIED},
    "phi3": {"dora, rslora": DORA_RSLORA},
    "phi4-mini": {"tied, new tokens": NEW_TOKENS_WHOLE},
    "olmo2": {"both whole": BOTH_WHOLE, "low rank": BOTH_LOW_RANK},
    "granite": {"biases, dora": BIASES, "new tokens": NEW_TOKENS},
    "smollm3": {"rslora": RSLORA},
}
"""By the cases of tests/kit/families.py."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings=True.*:UserWarning",  # that both are trained apart
    "ignore:.*no tied modules were found:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def logits(causal_lm, params, lora):
    return causal_lm.apply(params, lora, IDS)


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    @functools.cache
    def base(family):
        folder = tmp_path_factory.mktemp("families") / "base"
        return models.save(families.random_model(family), folder)

    return base


def trained(base, kind):
    """Awake: B is zero at first, which would hide every mistake."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        base, dtype="float32", load_in_16bit=True, max_seq_length=64
    )
    if kind.new_tokens:
        add_new_tokens(model, tokenizer, NEW)
    model = FastLanguageModel.get_peft_model(model, r=4, **kind.settings)
    rng = np.random.default_rng(0)
    awake = lambda x: np.asarray(x) + 0.05 * rng.standard_normal(x.shape).astype("float32")
    return dataclasses.replace(model, lora=jax.tree.map(awake, model.lora)), tokenizer


def test_every_family_has_its_turn():
    assert {families.CASES[case][0] for case in TABLE} == set(families.EACH)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, id=f"{family}: {name}")
        for family in TABLE
        for name, kind in TABLE[family].items()
    ],
)
def test_elsewhere_it_is_the_model_that_was_trained(bases, tmp_path, family, kind):
    model, tokenizer = trained(bases(family), kind)
    ours = logits(model.causal_lm, model.params, model.lora)
    model.save_pretrained(tmp_path / "adapter", tokenizer)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)

    base = loaded(bases(family))
    size = model.causal_lm.config.vocab_size
    if kind.new_tokens:
        base.resize_token_embeddings(size, mean_resizing=False)
    assert relative_rms(ours, torch_logits(base)) > 1e-2, "it must matter to show anything"
    assert_close(ours, torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), 1e-4, "PEFT")
    merged = loaded(tmp_path / "merged")
    assert merged.config.vocab_size == size
    assert_close(ours, torch_logits(merged), 1e-4, "transformers")
