"""`optim_args`: what only one optimizer has, in one string such as "momentum=0.9, nesterov=True", by torch's names."""

from typing import Any

from jaxtune.errors import nearest

DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "nesterov": False},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
}
"""Of the optimizers that have some: torch's, which transformers' trainer leaves alone."""
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def arguments(optim: str, text: str | None) -> dict[str, Any]:
    """All that the optimizer has, as the text says or by default; a ValueError says what was expected, and its second
    argument what was perhaps meant."""
    found = dict(DEFAULTS.get(optim, {}))
    for each in filter(None, (part.strip() for part in (text or "").split(","))):
        name, _, value = (part.strip() for part in each.partition("="))
        if name not in found:
            known = (
                f"some of {', '.join(found)} for optim={optim!r}" if found else f"none for optim={optim!r}"
            )
            raise ValueError(known, nearest(name, found))
        found[name] = _read(name, value, type(found[name]))
    if found.get("nesterov") and not found["momentum"] > 0:
        raise ValueError("a momentum above 0 beside nesterov", "")
    return found


def _read(name: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in _TRUTH:
            raise ValueError(f"{name}=True or {name}=False", "")
        return _TRUTH[value.lower()]
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    is_decay = name != "eps"
    if not (0 <= number < 1 if is_decay else 0 <= number < float("inf")):
        raise ValueError(f"{name} as a number from 0" + (" to below 1" if is_decay else " on"), "")
    return number
