"""Times operators too short to be called one by one: several layers in a row in one program, as in a model."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import peers as torch_peers
from pallas_kernels.timing import Row, check, measured, time_compiled

LAYERS = 8  # per call: the host takes longer to start one than the device to run it
FORWARD, BACKWARD = "forward", "backward"


class Operator(NamedTuple):
    """How to run and to check one operator; `inputs` are whatever its functions take."""

    tolerance: Mapping[str, float]
    """Error ratios of one layer to the definition in float32, by result."""
    one: Callable[[str, Any], dict[str, Array]]
    """(implementation, inputs) -> y and gradients of one layer, by name."""
    layers: Mapping[str, Callable[[str, Any], Any]]
    """By call: (implementation, inputs) -> anything that depends on LAYERS layers, each on the one before."""
    fla: Callable[[Any], tuple[Callable, Sequence, Any]]
    """inputs -> (call of fla's layer without arguments, tensors to differentiate by, cotangent)."""


def measure_layers(
    operator: Operator, case: Any, inputs: Any, implementations: Sequence[str], peers: Sequence[str]
) -> Iterator[Row]:
    """Yields forward and backward of every implementation, then of every peer; a failure is a row that says why."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
    want = operator.one("reference", wide)
    for names, ours, time in ((implementations, True, _time_ours), (peers, False, _time_fla)):
        for name in names:
            for call in (FORWARD, BACKWARD):
                run = functools.partial(time, operator, name, call, inputs, want)
                yield measured(Row(case.name, call, name, ours, case.work(call)), run)


def _time_ours(operator: Operator, name: str, call: str, inputs, want: dict[str, Array]) -> dict[str, float]:
    check(operator.one(name, inputs), want, operator.tolerance)
    timed = time_compiled(functools.partial(operator.layers[call], name), inputs)
    return {"ms": timed.ms / LAYERS, "compiled_gb": timed.compiled_gb}


def _time_fla(operator: Operator, _: str, call: str, inputs, want: dict[str, Array]) -> dict[str, float]:
    """In a CUDA graph; the backward is the time of both less that of the forward."""
    import torch

    forward, leaves, dy = operator.fla(inputs)

    def both():
        y = forward()
        return y, *torch.autograd.grad(y, leaves, dy)

    check(dict(zip(operator.tolerance, torch_peers.arrays(both()), strict=True)), want, operator.tolerance)
    with torch.no_grad():
        forward_ms = torch_peers.device_ms(torch_peers.recorded(forward))
    if call == FORWARD:
        return {"ms": forward_ms}
    return {"ms": torch_peers.device_ms(torch_peers.recorded(both)) - forward_ms}
