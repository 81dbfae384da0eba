"""The torch twin of an adapted model: transformers' model under PEFT, with our adapter's values."""

import numpy as np
import peft
import torch

from jaxtune.lora import peft_format


def peft_twin(theirs, ours) -> torch.nn.Module:
    config = ours.causal_lm.lora_config
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    twin = peft.get_peft_model(theirs, settings)
    tensors = peft_format.to_tensors(ours.lora, config, ours.module_names)
    result = peft.set_peft_model_state_dict(
        twin, {name: torch.from_numpy(np.array(a)) for name, a in tensors}
    )
    assert not result.unexpected_keys
    return twin.train()


def gradients(twin) -> dict[str, np.ndarray]:
    return {
        name.replace(".default", ""): weight.grad.numpy()
        for name, weight in twin.named_parameters()
        if weight.grad is not None
    }
