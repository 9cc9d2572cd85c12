"""Picks the implementation of an operator, or raises with every refusal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _accept(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """A function and the reason, if any, why it cannot serve given arguments.

    `refuse` takes the same arguments as `run` and reads shapes, dtypes and the backend only.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None] = _accept


def call(op: str, implementations: Mapping[str, Implementation], name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Runs `implementations[name]`; "auto" runs the first that accepts.

    Args:
      op: name of the operator, for messages.
      implementations: fastest first.
      name: a key of `implementations`, or "auto".

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one refuses, or all do; the message gives every reason.
    """
    if name != "auto" and name not in implementations:
        raise ValueError(f"{op}: implementation={name!r} is unknown; choose auto, {', '.join(implementations)}")
    candidates = implementations if name == "auto" else {name: implementations[name]}
    refusals = []
    for candidate, implementation in candidates.items():
        reason = implementation.refuse(*args, **kwargs)
        if reason is None:
            return implementation.run(*args, **kwargs)
        refusals.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"{op}: no implementation accepts these arguments; " + "; ".join(refusals))
