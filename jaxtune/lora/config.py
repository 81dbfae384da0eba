"""LoRA's settings: frozen, validated once, the same names as PEFT's."""

import dataclasses
import math
import re

from jaxtune.errors import AdapterError

ALL_LINEAR = "all-linear"
"""Every linear inside the layers."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r: int = 16
    """Rank of the update B A."""
    lora_alpha: float = 16
    """The update is scaled by alpha / r."""
    target_modules: tuple[str, ...] | str = PROJECTIONS
    """Names of modules (the end of their path), one regular expression for the whole path, or "all-linear", as PEFT."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise AdapterError(
                f"LoRA was asked for with rank r={self.r!r}.",
                expected="a whole number of at least 1.",
                fix="Choose r, for example 16.",
            )
        if not isinstance(self.target_modules, str):
            # A set, in one order: equal settings compare (and compile) as equal.
            object.__setattr__(self, "target_modules", tuple(sorted(set(self.target_modules))))
        else:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise AdapterError(
                    f"target_modules={self.target_modules!r} is not a regular expression: {error}.",
                    expected="a list of module names, or a regular expression that matches whole module paths.",
                    fix="Correct the expression, or give a list such as ['q_proj', 'v_proj'].",
                ) from error

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, module: str) -> bool:
        """Whether a module, by its Hugging Face path ("model.layers.0.self_attn.q_proj"), gets an adapter."""
        if self.target_modules == ALL_LINEAR:
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(module == name or module.endswith("." + name) for name in self.target_modules)
