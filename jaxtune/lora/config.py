"""LoRA's settings: frozen, validated once, the same names as PEFT's; and what they mean for a module: whether it gets
an adapter, of which rank, scaled by what."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtune.errors import AdapterError

ALL_LINEAR = "all-linear"
"""Every linear inside the layers: not the embedding, nor the head."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "embed_tokens", "lm_head"
WHOLE_MODULES = (EMBEDDING, HEAD)
"""What may be trained whole."""
EMBEDDING_PATH, HEAD_PATH = f"model.{EMBEDDING}", HEAD
"""Their Hugging Face paths."""
BIASES = ("none", "lora_only", "all")
PISSA = "pissa"
LOFTQ = "loftq"
INITS = (True, False, "gaussian", PISSA, LOFTQ)

Pattern = tuple[tuple[str, float], ...]
"""Regular expressions for the end of a module's path, each with its value. The first that matches holds."""

ModuleNames = Callable[[tuple], list[str]]
"""The Hugging Face path of each repeat of a stacked module, from its path in `params`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r: int = 16
    """Rank of the update B A."""
    lora_alpha: float = 16
    """The update is scaled by alpha / r."""
    lora_dropout: float = 0.0
    """How likely an input of A is dropped while training."""
    target_modules: tuple[str, ...] | str = PROJECTIONS
    """Names of modules (the end of their path), one regular expression for the whole path, or "all-linear", as PEFT."""
    exclude_modules: tuple[str, ...] | str | None = None
    """What `target_modules` selects and is left out all the same; names, or one regular expression."""
    layers_to_transform: tuple[int, ...] | None = None
    """Only these layers get an adapter; None is all of them."""
    layers_pattern: tuple[str, ...] | None = None
    """What stands before a layer's number in a module's path; None is any name."""
    rank_pattern: Pattern = ()
    """Ranks of their own: given as a dict, kept as pairs in its order."""
    alpha_pattern: Pattern = ()
    """Alphas of their own, likewise."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Train the length of each row of a weight apart from its direction."""
    bias: str = "none"
    """Whose biases are trained too: of no module, of those with an adapter ("lora_only"), or "all"."""
    modules_to_save: tuple[str, ...] = ()
    """Trained whole, beside the adapter: embed_tokens, lm_head."""
    ensure_weight_tying: bool = False
    """Whether a head that is the embedding remains it, as that is trained; else each is trained apart. See `on`."""
    init_lora_weights: bool | str = True
    """How A and B begin: True (A uniform, B zero), "gaussian" (A normal, B zero), False (both uniform), "pissa" (as the
    base's principal part, which it loses), "loftq" (as most of what the base lost to 4 bits). What is uniform is normal
    in an embedding's. The last two, and DoRA, are for linears inside the layers."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            _require_kind(field.name, given)
            object.__setattr__(self, field.name, _canonical(field.name, given))
        _require_rank("r", self.r)
        for pattern, rank in self.rank_pattern:
            _require_rank(f"rank_pattern[{pattern!r}]", rank)
        for name, given in (
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{pattern!r}]", alpha) for pattern, alpha in self.alpha_pattern),
        ):
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise AdapterError(
                    f"LoRA was asked for with {name}={given!r}.",
                    expected="a number.",
                    fix="Choose, for example, 16.",
                )
        alphas = [self.lora_alpha, *(alpha for _, alpha in self.alpha_pattern)]
        if self.init_lora_weights in (PISSA, LOFTQ) and min(alphas) <= 0:
            raise AdapterError(
                f"init_lora_weights={self.init_lora_weights!r} with an alpha of {min(alphas)}.",
                expected="a positive one: B A, scaled, has to make a given matrix.",
                fix="Choose, for example, lora_alpha=16.",
            )
        if not 0 <= self.lora_dropout < 1:
            raise AdapterError(
                f"lora_dropout={self.lora_dropout!r}.",
                expected="a share from 0 up to, but not including, 1.",
                fix="Choose, for example, 0.05; 0 drops nothing.",
            )
        _require_one_of("bias", self.bias, BIASES)
        _require_one_of("init_lora_weights", self.init_lora_weights, INITS)
        for module in self.modules_to_save:
            _require_one_of("modules_to_save", module, WHOLE_MODULES)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(self, name), str):
                _require_regex(f"{name}={expression!r}", expression)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, _ in getattr(self, name):
                _require_regex(f"{name}'s key {pattern!r}", pattern)
        self._require_layers()
        self._require_plain_outside_layers()

    def _require_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None and self.layers_pattern is not None:
            raise AdapterError(
                f"layers_pattern={self.layers_pattern!r} without layers_to_transform.",
                expected="both, or neither.",
                fix="Say which layers in layers_to_transform.",
            )
        if layers is not None and isinstance(self.target_modules, str):
            raise AdapterError(
                f"layers_to_transform={list(layers)} beside target_modules={self.target_modules!r}.",
                expected="a list of module names: PEFT combines layers with nothing else.",
                fix="Name the modules, or put the layers' numbers into the expression.",
            )
        if layers is not None and any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
            raise AdapterError(
                f"layers_to_transform={list(layers)}.",
                expected="whole numbers from 0.",
                fix="Correct it, or leave it out for all layers.",
            )

    def _require_plain_outside_layers(self) -> None:
        how = "use_dora=True" if self.use_dora else f"init_lora_weights={self.init_lora_weights!r}"
        if not self.use_dora and self.init_lora_weights not in (PISSA, LOFTQ):
            return
        for module in (EMBEDDING_PATH, HEAD_PATH):
            if self.targets(module):
                name = module.rpartition(".")[2]
                raise AdapterError(
                    f"{how} beside target_modules={self.target_modules!r}, which has {name}.",
                    expected=f"linears inside the layers: {name} can have plain LoRA only.",
                    fix=f"Leave one of the two out, or train {name} whole, as modules_to_save=[{name!r}]. An adapter "
                    "that has both: merge it with peft first.",
                )

    def on(self, *, tied: bool) -> "LoraConfig":
        """What the settings mean for a model, and PEFT makes of them: where embedding and head are two,
        `ensure_weight_tying` means nothing; where they are one, what is asked of the head is asked of the embedding."""
        if not self.ensure_weight_tying:
            return self
        if not tied:
            return dataclasses.replace(self, ensure_weight_tying=False)
        as_embedding = lambda names: tuple(EMBEDDING if name == HEAD else name for name in names)
        targets = self.target_modules
        if isinstance(targets, tuple):
            targets = as_embedding(targets)
        elif selects(targets, HEAD_PATH) and not selects(targets, EMBEDDING_PATH):
            targets = f"{targets}|{re.escape(EMBEDDING_PATH)}"
        settings = dataclasses.replace(
            self, target_modules=targets, modules_to_save=as_embedding(self.modules_to_save)
        )
        scales = [settings.scale_of(module) for module in (EMBEDDING_PATH, HEAD_PATH)]
        if settings.targets(EMBEDDING_PATH) and scales[0] != scales[1]:
            raise AdapterError(
                f"ensure_weight_tying=True; patterns scale {EMBEDDING} by {scales[0]:g}, {HEAD} by {scales[1]:g}.",
                expected="one rank and one alpha for both, which are one.",
                fix=f"Give {EMBEDDING} and {HEAD} the same in rank_pattern and alpha_pattern.",
            )
        return settings

    def continues(self, other: "LoraConfig | None") -> bool:
        """Whether both mean the same once the adapter has begun."""
        if other is None or (self.init_lora_weights == PISSA) != (other.init_lora_weights == PISSA):
            return False
        return dataclasses.replace(self, init_lora_weights=other.init_lora_weights) == other

    @property
    def scale(self) -> float:
        """Of a module without patterns of its own."""
        return self._scale(self.lora_alpha, self.r)

    def targets(self, module: str) -> bool:
        """Whether a module, by its Hugging Face path ("model.layers.0.self_attn.q_proj"), gets an adapter."""
        if selects(self.exclude_modules, module) or selects(self.modules_to_save, module):
            return False
        if module == HEAD_PATH and self.ensure_weight_tying:
            return False
        if self.target_modules == ALL_LINEAR:
            return module not in (EMBEDDING_PATH, HEAD_PATH)
        # As PEFT: a module that is named with its whole path is meant, whatever its layer.
        return module in self.target_modules or (
            selects(self.target_modules, module) and self._in_layers(module)
        )

    def rank_of(self, module: str) -> int:
        """The module's rank, 0 without an adapter."""
        return int(_first(self.rank_pattern, module, self.r)) if self.targets(module) else 0

    def scale_of(self, module: str) -> float:
        """What multiplies the module's B A."""
        rank = int(_first(self.rank_pattern, module, self.r))
        return self._scale(_first(self.alpha_pattern, module, self.lora_alpha), rank)

    def trains_bias(self, module: str) -> bool:
        """Whether the bias of a linear that has one is trained."""
        return self.bias == "all" or (self.bias == "lora_only" and self.targets(module))

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        # As PEFT: the first number that follows a name is the layer's.
        before = [r"[^.]+\.[^.]*"] if self.layers_pattern is None else self.layers_pattern
        found = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in before)
        return next((int(match[1]) in self.layers_to_transform for match in found if match), False)


def selects(names: tuple[str, ...] | str | None, module: str) -> bool:
    """Whether a module's path is meant by names, which its end is compared with, or by an expression for the whole."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def matches(pattern: str, module: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means this module."""
    return _compiled(pattern).match(module) is not None


def _first(pattern: Pattern, module: str, otherwise: float) -> float:
    return next((value for key, value in pattern if matches(key, module)), otherwise)


def _canonical(name: str, value: Any) -> Any:
    """Equal settings compare (and compile) as equal: sets in one order, dicts as pairs, numbers as lists of one."""
    match name:
        case "target_modules" | "exclude_modules" | "modules_to_save":
            if isinstance(value, str):
                whole = value.lower() == ALL_LINEAR and name == "target_modules"
                return ALL_LINEAR if whole else (value,) if name == "modules_to_save" else value
            if not value:
                return None if name == "exclude_modules" else ()
            return tuple(sorted(set(value)))
        case "layers_to_transform":
            numbers: Iterable[int] = (value,) if isinstance(value, int) else value or ()
            return tuple(sorted(set(numbers))) or None
        case "layers_pattern":
            return ((value,) if isinstance(value, str) else tuple(value)) if value else None
        case "rank_pattern" | "alpha_pattern":
            return tuple((value.items() if isinstance(value, Mapping) else value) or ())
        case "init_lora_weights":
            if value is None:
                return True
            if isinstance(value, str) and re.fullmatch(r"pissa(_niter_\d+)?", value.lower()):
                # By the whole decomposition, always: a sketched one could not be found again by who loads the adapter.
                return PISSA
            return value.lower() if isinstance(value, str) else value
    return value


def _require_kind(name: str, value: Any) -> None:
    """Names are strings, patterns mappings (or pairs), a share is a number."""
    match name:
        case "target_modules" | "exclude_modules" | "modules_to_save" | "layers_pattern":
            expected = "a name, or a list of names."
            listed = isinstance(value, list | tuple | set | frozenset)
            good = (
                value is None or isinstance(value, str) or (listed and all(isinstance(n, str) for n in value))
            )
        case "rank_pattern" | "alpha_pattern":
            expected = "a dict of module names, each with its number."
            pairs = value.items() if isinstance(value, Mapping) else value
            listed = isinstance(pairs, tuple) or isinstance(value, Mapping)
            good = value is None or (listed and all(len(p) == 2 and isinstance(p[0], str) for p in pairs))
        case "use_rslora" | "use_dora" | "ensure_weight_tying":
            expected = "True or False."
            good = isinstance(value, bool)
        case "lora_dropout":
            expected = "a number."
            good = isinstance(value, int | float) and not isinstance(value, bool)
        case _:
            return
    if not good:
        raise AdapterError(f"{name}={value!r}.", expected=expected, fix=f"Correct it, or leave {name} out.")


def _require_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(
            f"LoRA was asked for with rank {name}={rank!r}.",
            expected="a whole number of at least 1.",
            fix="Choose r, for example 16.",
        )


def _require_one_of(name: str, value: Any, known: tuple) -> None:
    if not any(value is one or (isinstance(one, str) and value == one) for one in known):
        raise AdapterError(
            f"{name}={value!r}.",
            expected=f"one of {', '.join(map(repr, known))}.",
            fix=f"Choose one of these, or leave {name} out.",
        )


def _require_regex(what: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise AdapterError(
            f"{what} is not a regular expression: {error}.",
            expected="a list of module names, or a regular expression that matches module paths.",
            fix="Correct the expression, or give a list such as ['q_proj', 'v_proj'].",
        ) from error
