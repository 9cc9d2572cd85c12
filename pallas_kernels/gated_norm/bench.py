"""Times the gated RMS norm: several in a row in one program, as in the layers of a model."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.bench_layers import BACKWARD, FORWARD, LAYERS, Operator, measure_layers
from pallas_kernels.gated_norm import api
from pallas_kernels.peers import tensor
from pallas_kernels.timing import Row, Work

EPS = 1e-5
TOLERANCE = {"y": 5e-3, "dx": 5e-3, "d_logits": 5e-3, "d_weight": 5e-3}  # error ratio to the definition in float32


class Case(NamedTuple):
    """One problem: bfloat16, sigmoid."""

    name: str
    batch: int
    tokens: int
    heads: int
    channels: int = 128

    def work(self, call: str) -> Work:
        """Forward x and logits in, y out; backward these and dy in, dx and d logits out."""
        elements = self.batch * self.tokens * self.heads * self.channels
        arrays, operations = (3, 8) if call == FORWARD else (5, 20)
        return Work(2 * arrays * elements, operations * elements)


class Inputs(NamedTuple):
    """Arrays of one layer."""

    x: Float[Array, "B T H V"]
    logits: Float[Array, "B T H V"]
    weight: Float[Array, "V"]
    dy: Float[Array, "B T H V"]


CASES = {case.name: case for case in (Case("B8-T4096-H8", 8, 4096, 8), Case("B8-T4096-H32", 8, 4096, 32))}
IMPLEMENTATIONS = tuple(api.IMPLEMENTATIONS)
PEERS = ("fla",)


def measure(case: Case, implementations: Sequence[str], peers: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of every implementation, then of every peer; a failure is a row that says why."""
    layers = {FORWARD: _forward_layers, BACKWARD: _backward_layers}
    operator = Operator(TOLERANCE, _one, layers, _fla)
    return measure_layers(operator, case, _draw(case), implementations, peers)


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case) -> Inputs:
    key = iter(jax.random.split(jax.random.key(0), 4))
    shape = (case.batch, case.tokens, case.heads, case.channels)
    x, logits, dy = (jax.random.normal(next(key), shape).astype(jnp.bfloat16) for _ in range(3))
    return Inputs(x, logits, jax.random.normal(next(key), shape[-1:]), dy)


def _layer(implementation: str, x, logits, weight):
    return api.gated_rms_norm(x, logits, weight, eps=EPS, implementation=implementation)


def _gradients(implementation: str, inputs: Inputs):
    y, pull_back = jax.vjp(functools.partial(_layer, implementation), *inputs[:3])
    return y, *pull_back(inputs.dy)


@functools.partial(jax.jit, static_argnums=0)
def _one(implementation: str, inputs: Inputs) -> dict[str, Array]:
    return dict(zip(("y", "dx", "d_logits", "d_weight"), _gradients(implementation, inputs), strict=True))


def _forward_layers(implementation: str, inputs: Inputs):
    layer = jax.jit(lambda x: _layer(implementation, x, *inputs[1:3]))
    x = inputs.x
    for _ in range(LAYERS):
        x = jax.lax.optimization_barrier(layer(x))  # or XLA makes one pass of all of them
    return x


def _backward_layers(implementation: str, inputs: Inputs):
    """Each layer's gradients are the next one's inputs and cotangents."""
    layer = jax.jit(lambda x, dy: _gradients(implementation, inputs._replace(x=x, dy=dy))[1:])
    x, dy, total = inputs.x, inputs.dy, 0
    for _ in range(LAYERS):
        x, dy, d_weight = jax.lax.optimization_barrier(layer(x, dy))
        total += d_weight
    return x, dy, total


def _fla(inputs: Inputs):
    """fla.modules' gated norm."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    x, logits, weight, dy = (tensor(a).requires_grad_() for a in inputs)
    return lambda: rms_norm_gated(x, logits, weight, None, activation="sigmoid", eps=EPS), (x, logits, weight), dy
