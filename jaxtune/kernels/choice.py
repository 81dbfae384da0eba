"""How an op picks its implementation: None takes the first that can run here, a name forces one or raises why not."""

from collections.abc import Callable, Mapping

Why = Callable[[], str | None] | None
"""Says why an implementation cannot run on this machine, or None if it can. None in its place: always can."""


Candidates = Mapping[str, Why]


def runnable(candidates: Candidates) -> list[str]:
    """Those that can run on this machine, in order of preference."""
    return [name for name, why_not in candidates.items() if why_not is None or why_not() is None]


def choose(op: str, requested: str | None, candidates: Candidates) -> str:
    """`candidates` in order of preference; the last one (XLA) must be able to run anywhere."""
    if requested is None:
        return runnable(candidates)[0]
    if requested not in candidates:
        raise ValueError(f"{op} has no implementation {requested!r}; it has {', '.join(candidates)}")
    why_not = candidates[requested]
    reason = why_not() if why_not else None
    if reason is not None:
        raise NotImplementedError(f"{op}: {requested!r} cannot run here: {reason}")
    return requested
