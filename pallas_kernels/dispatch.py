"""Picks the implementation of an operator, or raises with every refusal."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels.hopper import refuse_other_backends
from pallas_kernels.partition import Axes, partition

_logger = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()  # operators and what they run instead of a kernel, said already


def _accept(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """A function and the reason, if any, why it cannot serve given arguments.

    `refuse` takes the same arguments as `run` and reads shapes, dtypes and the backend only.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None] = _accept


def call(
    op: str,
    implementations: Mapping[str, Implementation],
    name: str,
    /,
    *args: Any,
    axes: Axes | None = None,
    **kwargs: Any,
) -> Any:
    """Runs `implementations[name]`; "auto" runs the first that accepts.

    Args:
      op: name of the operator, for messages.
      implementations: fastest first.
      name: a key of `implementations`, or "auto". When that passes over a faster one on a GPU, a warning is logged,
        once per process.
      axes: what the operator is independent in: on several devices each then runs its part, and the implementation is
        chosen by the sizes of a part. None: XLA decides.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one refuses, or all do; the message gives every reason.
    """
    if name != "auto" and name not in implementations:
        raise ValueError(f"{op}: implementation={name!r} is unknown; choose auto, {', '.join(implementations)}")
    run = functools.partial(_run_first, op, implementations, name)
    return run(*args, **kwargs) if axes is None else partition(run, axes, args, kwargs)


def _run_first(op: str, implementations: Mapping[str, Implementation], name: str, /, *args: Any, **kwargs: Any) -> Any:
    candidates = implementations if name == "auto" else {name: implementations[name]}
    refusals = []
    for candidate, implementation in candidates.items():
        reason = implementation.refuse(*args, **kwargs)
        if reason is None:
            if refusals:
                _tell_once(op, candidate, refusals)
            return _run_once_traced(op, implementation.run, args, kwargs)
        refusals.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"{op}: no implementation accepts these arguments; " + "; ".join(refusals))


def _tell_once(op: str, chosen: str, refusals: list[str]) -> None:
    """Logs what a GPU runs in place of its kernels; other devices have none."""
    if not refuse_other_backends() and (op, chosen) not in _told:
        _told.add((op, chosen))
        _logger.warning("%s runs %s, which is slower: %s", op, chosen, "; ".join(refusals))


def _run_once_traced(op: str, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Inside a program for a GPU, equal calls share one trace and one lowering: those of a kernel take seconds."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    if refuse_other_backends() or not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return run(*args, **kwargs)
    arrays = [leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray))]
    fixed = tuple(_ARRAY if isinstance(leaf, (jax.Array, np.ndarray)) else leaf for leaf in leaves)
    return _compiled_call(op, run, structure, fixed)(*arrays)


_ARRAY = object()


@functools.cache
def _compiled_call(op: str, run: Callable[..., Any], structure: Any, fixed: tuple) -> Callable[..., Any]:
    def call_with(*arrays):
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in fixed]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return run(*args, **kwargs)

    call_with.__name__ = op
    return jax.jit(call_with)
