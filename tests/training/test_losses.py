"""The loss sees the logits that the model gives: scaled, capped, and divided by a temperature in that order."""

import jax
import numpy as np
import pytest

from jaxtune.training.losses import label_nll
from tests.kit import tiny
from tests.kit.compare import assert_close


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_label_nll_is_the_log_softmax_of_the_models_logits(temperature):
    model = tiny.model(logit_scale=0.5, logit_softcap=0.3, windows=(None,))
    params, lora = tiny.params(model), tiny.lora(model)
    micro = {name: array[0] for name, array in tiny.batch(micro_batches=1).items()}
    nll = jax.jit(label_nll(model, temperature=temperature))(lora, params, micro).reshape(
        micro["labels"].shape
    )
    logits = model.apply(
        params, lora, micro["tokens"], segments_BT=micro["segment_ids"], positions_BT=micro["positions"]
    )
    assert 0.25 < abs(np.asarray(logits)).max() < 0.3, "the cap must matter"
    logp = np.asarray(jax.nn.log_softmax(logits / temperature))
    labels = micro["labels"]
    expected = -np.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
    assert_close(nll, np.where(labels < 0, 0, expected), 1e-5)
