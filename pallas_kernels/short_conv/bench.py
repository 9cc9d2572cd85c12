"""Times the short convolution: several in a row in one program, as in the layers of a model."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bench_layers import BACKWARD, FORWARD, LAYERS, Operator, measure_layers
from pallas_kernels.peers import tensor
from pallas_kernels.short_conv import api
from pallas_kernels.timing import Row, Work

WIDTH = 4
DOCUMENT = 700  # tokens of each packed document
TOLERANCE = {"y": 5e-3, "dx": 5e-3, "d_weight": 5e-3}  # error ratio of one layer to the definition in float32


class Case(NamedTuple):
    """One problem: bfloat16, no cache."""

    name: str
    batch: int
    tokens: int
    channels: int
    packed: bool = False

    def work(self, call: str) -> Work:
        """Forward x in and y out; backward x and dy in, dx out. One multiplication and addition per tap."""
        elements = self.batch * self.tokens * self.channels
        arrays, products = (2, WIDTH) if call == FORWARD else (3, 3 * WIDTH)
        return Work(2 * arrays * elements, 2 * products * elements)


class Inputs(NamedTuple):
    """Arrays of one layer."""

    x: Float[Array, "B T D"]
    weight: Float[Array, "D W"]
    dy: Float[Array, "B T D"]
    segment_ids: Int[Array, "B T"] | None


CASES = {
    case.name: case
    for D in (1024, 4096)
    for case in (Case(f"B8-T4096-D{D}", 8, 4096, D), Case(f"B8-T4096-D{D}-packed", 8, 4096, D, packed=True))
}
IMPLEMENTATIONS = tuple(name for name in api.IMPLEMENTATIONS if name != "reference")
PEERS = ("fla",)


def measure(case: Case, implementations: Sequence[str], peers: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of every implementation, then of every peer; a failure is a row that says why."""
    layers = {FORWARD: _forward_layers, BACKWARD: _backward_layers}
    operator = Operator(TOLERANCE, _one, layers, functools.partial(_fla, case))
    return measure_layers(operator, case, _draw(case), implementations, peers)


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case) -> Inputs:
    key = iter(jax.random.split(jax.random.key(0), 3))
    shape = (case.batch, case.tokens, case.channels)
    x, dy = (jax.random.normal(next(key), shape).astype(jnp.bfloat16) for _ in range(2))
    weight = (jax.random.normal(next(key), (case.channels, WIDTH)) / 2).astype(jnp.bfloat16)
    ids = 1 + jax.lax.broadcasted_iota(jnp.int32, shape[:2], 1) // DOCUMENT if case.packed else None
    return Inputs(x, weight, dy, ids)


def _layer(implementation: str, x, weight, ids):
    return api.short_conv(x, weight, segment_ids=ids, implementation=implementation)[0]


def _gradients(implementation: str, x, weight, dy, ids):
    y, pull_back = jax.vjp(lambda x, weight: _layer(implementation, x, weight, ids), x, weight)
    return y, *pull_back(dy)


@functools.partial(jax.jit, static_argnums=0)
def _one(implementation: str, inputs: Inputs) -> dict[str, Array]:
    return dict(zip(("y", "dx", "d_weight"), _gradients(implementation, *inputs), strict=True))


def _forward_layers(implementation: str, inputs: Inputs):
    layer = jax.jit(functools.partial(_layer, implementation))
    x = inputs.x
    for _ in range(LAYERS):
        x = jax.lax.optimization_barrier(layer(x, inputs.weight, inputs.segment_ids))
    return x


def _backward_layers(implementation: str, inputs: Inputs):
    """The gradients of one layer are the cotangents of the next."""
    layer = jax.jit(lambda dy: _gradients(implementation, *inputs._replace(dy=dy))[1:])
    dy, total = inputs.dy, 0
    for _ in range(LAYERS):
        dy, d_weight = jax.lax.optimization_barrier(layer(dy))
        total += d_weight
    return dy, total


def _fla(case: Case, inputs: Inputs):
    """fla.modules' convolution."""
    from fla.modules.causal_conv1d import causal_conv1d

    if case.packed:
        raise NotImplementedError("fla: timed without documents")
    x, weight, dy = (tensor(a).requires_grad_() for a in inputs[:3])
    return lambda: causal_conv1d(x, weight, activation="silu")[0], (x, weight), dy
