"""Times the decode step of KDA against its peer: device time of one step, many of them in one call."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.kda import api, bench_peers
from pallas_kernels.kda.gates import SoftplusGate
from pallas_kernels.timing import Row, Work, check, measured, time_compiled

STEPS = 64  # per call: the host takes longer to start one than the device to run it
HEADS, DIM = 32, 128
TOLERANCE = {"o": 0.005, "state": 0.005}  # error ratio to the definition, after the last step


class Case(NamedTuple):
    """One problem: softplus gate, L2 norm inside, bfloat16 inputs."""

    name: str
    sequences: int
    tokens: int = 1
    state: str = "float32"

    @property
    def work(self) -> Work:
        """The state read and written once; per token q, k, v, g in and o out, and the recurrence."""
        channels = self.sequences * HEADS * DIM
        moved = 2 * channels * DIM * jnp.dtype(self.state).itemsize + 2 * 5 * self.tokens * channels
        return Work(moved, 7 * self.tokens * channels * DIM)


class Inputs(NamedTuple):
    """One token or several per sequence, and the state before them."""

    q: Float[Array, "N T H K"]
    k: Float[Array, "N T H K"]
    v: Float[Array, "N T H V"]
    g: Float[Array, "N T H K"]
    beta: Float[Array, "N T H"]
    gate: SoftplusGate
    state: Float[Array, "N H V K"]


CASES = {
    case.name: case
    for case in (
        *(Case(f"N{n}", n) for n in (1, 64, 256)),
        Case("N256-state-bfloat16", 256, state="bfloat16"),
        Case("N64-T4", 64, tokens=4),
    )
}
# Not the definition: in a program of many steps XLA joins several in one pass over the state and leaves out the outputs
# that nobody reads; its time would not be that of decoding.
IMPLEMENTATIONS = tuple(name for name in api.STEP_IMPLEMENTATIONS if name != "reference")
PEERS = ("fla",)


def measure(case: Case, implementations: Sequence[str], peers: Sequence[str]) -> Iterator[Row]:
    """Yields the row of every implementation, then of every peer; a failure is a row that says why."""
    inputs = _draw(case)
    want = jax.jit(functools.partial(_steps, "reference"))(inputs)
    for name in implementations:
        run = functools.partial(_time_ours, name, inputs, want)
        yield measured(Row(case.name, "step", name, True, case.work), run)
    for name in peers:
        for how in ("CUDA graph", "from Python"):
            run = functools.partial(_time_fla, case, inputs, want, how)
            yield measured(Row(case.name, "step", f"{name}, {how}", False, case.work), run)


def _time_ours(name: str, inputs: Inputs, want: dict[str, Array]) -> dict[str, float]:
    timed = time_compiled(functools.partial(_steps, name), inputs)
    check(timed.values, want, TOLERANCE)
    return {"ms": timed.ms / STEPS, "compiled_gb": timed.compiled_gb}


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case) -> Inputs:
    key = iter(jax.random.split(jax.random.key(0), 8))
    shape = (case.sequences, case.tokens, HEADS, DIM)
    q, k, v, g = (jax.random.normal(next(key), shape).astype(jnp.bfloat16) for _ in range(4))
    beta = jax.nn.sigmoid(jax.random.normal(next(key), shape[:-1]))
    gate = SoftplusGate(jax.random.uniform(next(key), (HEADS,)), jax.random.normal(next(key), (HEADS, DIM)) - 4)
    state = jax.random.normal(next(key), (case.sequences, HEADS, DIM, DIM)).astype(case.state)
    return Inputs(q, k, v, g, beta, gate, state)


def _steps(implementation: str, inputs: Inputs) -> dict[str, Array]:
    """The same token again and again; the outputs are those of the last step."""
    arrays = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    settings = {"gate": inputs.gate, "normalize_qk": True, "implementation": implementation}

    def step(_, carry):
        return api.step_kda(*arrays, carry[1], **settings)

    o, state = jax.lax.fori_loop(0, STEPS, step, (inputs.v, inputs.state), unroll=8)
    return {"o": o, "state": state}


def _time_fla(case: Case, inputs: Inputs, want: dict[str, Array], how: str) -> dict[str, float]:
    """Steps recorded in a CUDA graph, as ours are in a program, or each called from Python."""
    if case.tokens > 1 or case.state != "float32":
        raise NotImplementedError("fla: timed with one token and a float32 state")
    peer = bench_peers.FlaStep(inputs, STEPS)
    check(dict(zip(("o", "state"), peer.values(), strict=True)), want, TOLERANCE)
    return {"ms": peer.time_graph() if how == "CUDA graph" else peer.time_calls()}
