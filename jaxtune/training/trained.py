"""What a run trains, and the model that it is a part of: an adapter, or with full fine-tuning all weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import optax

from jaxtune.device_memory import committed
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.reporting.last_run import LastRun
from jaxtune.training.optimizers import averaged
from jaxtune.training.step import TrainState, init_state


class Trainable(Protocol):
    """What a trainer needs of a model; `jaxtune.LanguageModel` is one."""

    causal_lm: CausalLM
    params: Params
    lora: Lora | None
    full_finetuning: bool
    tokenizer: Any
    max_seq_length: int
    gradient_checkpointing: bool | str
    stop_ids: tuple[int, ...]
    last_run: LastRun | None

    def save_pretrained(
        self, save_directory: str | Path, tokenizer: Any = None, *, verify: bool = True
    ) -> None: ...


Newest = Callable[[], tuple[Params, Lora | None]]
"""The model's weights and its adapter as they are now, while either is being trained."""


class Trained:
    """There is one copy of it on the device: while whole weights are trained, the model's are the newest; an adapter
    goes to the host, unless someone else holds it, until the run leaves its own in the model."""

    def __init__(self, model: Trainable, optimizer: optax.GradientTransformation):
        self.model, self.is_all = model, model.lora is None
        trained, self.frozen = (model.params, {}) if model.lora is None else (model.lora, model.params)
        self.state = committed(init_state(trained, optimizer, consume=self.is_all), met=self.frozen)
        if not self.is_all:
            model.lora = jax.device_get(model.lora)

    def take(self, state: TrainState) -> None:
        """The one after a step, which consumed the one before."""
        self.state = state
        if self.is_all:
            self.model.params = state.trained

    def newest(self) -> tuple[Params, Lora | None]:
        return (self.model.params, None) if self.is_all else (self.model.params, self.state.trained)

    def left(self) -> tuple[Params, Lora | None]:
        """What the run would leave if it ended now."""
        final = averaged(self.state.trained, self.state.optimizer)
        return (final, None) if self.is_all else (self.model.params, final)

    def leave(self) -> None:
        self.model.params, self.model.lora = self.left()

    @property
    def is_gone(self) -> bool:
        """Consumed by a step that failed."""
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(self.state.trained))
