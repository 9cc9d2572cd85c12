"""Named KDA problems shared by tests and benches: shapes, inputs, tolerances, and how to run one."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.kda.api import chunk_kda
from pallas_kernels.kda.gates import Gate, LowerBoundGate, SoftplusGate
from pallas_kernels.testing import generator

BOUND = -5.0  # of the lower-bound gate

# Largest error ratio against the recurrence in float64, for half-precision inputs in single sequences ("dense") and in
# several documents in one row ("packed"), and for float32 inputs in either. Never relaxed. Beside them the largest
# error of the chunked form on a CPU over GRID: see the table in docs/kda.md.
# Source of the half-precision ones: flash-linear-attention, tests/ops/test_kda.py.
TOLERANCE = {
    "dense": {
        **{"o": 0.005, "final_state": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008, "dg": 0.02, "dbeta": 0.02},
        **{"da_log": 0.003, "ddt_bias": 0.008, "dinitial_state": 0.008},
    },
    "packed": {
        **{"o": 0.005, "final_state": 0.005, "dq": 0.007, "dk": 0.008, "dv": 0.007, "dg": 0.015, "dbeta": 0.015},
        **{"da_log": 0.008, "ddt_bias": 0.005, "dinitial_state": 0.007},
    },
    "float32": {
        **{"o": 1e-6, "final_state": 1e-6, "dq": 2e-6, "dk": 2e-6, "dv": 5e-6, "dg": 2e-5, "dbeta": 5e-6},
        **{"da_log": 2e-5, "ddt_bias": 3e-5, "dinitial_state": 2e-6},
    },
}


class Call(NamedTuple):
    """The part of a case that is fixed when it is traced: cases that share it share a compilation."""

    gate: str
    scale: float | None
    normalize_qk: bool
    tile: int | None


@dataclass(frozen=True)
class Case:
    """One problem. The defaults are those of most cases.

    Args:
      batch, time, heads, value_heads, key_dim, value_dim: B, T, H, HV, K, V.
      dtype: of q, k, v, beta, and of the raw gate logits.
      gate: "none": g is a log-decay; else it is a raw logit for that gate.
      scale: factor on the queries; None: K**-0.5.
      decay_divisor: divides the log-decay (large: slow forgetting).
      masked: probability that a log-decay is replaced by `masked_decay`.
      bounded: clip a log-decay at -5, the promise of the lower-bound gate.
      normalize_qk: normalise inside the operator, else before it.
      keys: "uniform" in [0, 1) (strongly correlated), "normal", "identical" for all tokens of a head, or "collinear"
        (cosine 0.999).
      beta: range of the step sizes: sigmoid of a normal number, "one" close to 1, or "double" up to 2.
      gate_offset: added to the raw logits.
      slope: whether the gate has an a_log.
      lengths: tokens of each document of every row, in order, padded with segment id 0 up to `time`; (): one document
        and no segment ids.
      tile: tokens per chunk; None: the default of the implementation.
    """

    name: str
    batch: int
    time: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    gate: Literal["none", "softplus", "lower_bound"] = "none"
    scale: float | None = 0.1
    decay_divisor: float = 1.0
    masked: float = 0.0
    masked_decay: float = 0.0
    bounded: bool = False
    normalize_qk: bool = False
    keys: Literal["uniform", "normal", "identical", "collinear"] = "uniform"
    beta: Literal["sigmoid", "one", "double"] = "sigmoid"
    gate_offset: float = 0.0
    slope: bool = True
    lengths: tuple[int, ...] = ()
    tile: int | None = None

    @property
    def call(self) -> Call:
        return Call(self.gate, self.scale, self.normalize_qk, self.tile)

    @property
    def tolerance(self) -> dict[str, float]:
        if self.dtype == "float32":
            return TOLERANCE["float32"]
        return TOLERANCE["packed" if self.lengths else "dense"]

    def reduced(self) -> "Case":
        """The same problem with fewer tokens and heads, and chunks half as long; T keeps its remainder by 64."""
        lengths = tuple(n if n < 64 else 64 + n % 32 for n in self.lengths)
        padding = min(self.time - sum(self.lengths), 40)
        time = sum(lengths) + padding if lengths else min(self.time, 128 + self.time % 64)
        heads = min(self.heads, 2)
        changes = {"batch": 1, "time": time, "heads": heads, "lengths": lengths, "tile": self.tile and self.tile // 2}
        return dataclasses.replace(self, value_heads=heads * self.value_heads // self.heads, **changes)


class Inputs(NamedTuple):
    """Arrays of one call, in the order of the public signature."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    g: Float[Array, "B T HV K"]
    beta: Float[Array, "B T HV"]
    a_log: Float[Array, "HV"] | None
    dt_bias: Float[Array, "HV K"] | None
    initial_state: Float[Array, "B HV V K"]
    segment_ids: Int[Array, "B T"] | None
    d_o: Float[Array, "B T HV V"]  # cotangents of the results
    d_final_state: Float[Array, "B HV V K"]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draws the inputs of a case: host arrays in their final dtypes."""
    B, T, H, HV, K, V = case.batch, case.time, case.heads, case.value_heads, case.key_dim, case.value_dim
    draw = functools.partial(generator, seed, case.name)
    narrow = functools.partial(np.asarray, dtype=jnp.dtype(case.dtype))
    wide = functools.partial(np.asarray, dtype=np.float32)
    q, k = draw("q").random((B, T, H, K)), _keys(case, draw("k"))
    if not case.normalize_qk:
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return Inputs(
        q=narrow(q),
        k=narrow(k),
        v=narrow(draw("v").random((B, T, HV, V))),
        g=(wide if case.gate == "none" else narrow)(_gate_input(case, draw("g"))),
        beta=narrow(_beta(case, draw("beta"))),
        a_log=wide(draw("a_log").standard_normal(HV)) if case.gate != "none" and case.slope else None,
        dt_bias=wide(draw("dt_bias").standard_normal((HV, K))) if case.gate != "none" else None,
        initial_state=wide(draw("initial_state").standard_normal((B, HV, V, K))),
        segment_ids=_segment_ids(case),
        d_o=narrow(draw("d_o").standard_normal((B, T, HV, V))),
        d_final_state=wide(draw("d_final_state").standard_normal((B, HV, V, K))),
    )


def _keys(case: Case, rng: np.random.Generator) -> np.ndarray:
    shape = (case.batch, case.time, case.heads, case.key_dim)
    match case.keys:
        case "uniform":
            return rng.random(shape)
        case "normal":
            return rng.standard_normal(shape)
    base = rng.standard_normal((case.batch, 1, case.heads, case.key_dim))
    if case.keys == "identical":
        return np.broadcast_to(base, shape)
    return base + 0.0316 * rng.standard_normal(shape)  # tangent of the angle to the base: cosine 0.9995 each


def _gate_input(case: Case, rng: np.random.Generator) -> np.ndarray:
    raw = rng.standard_normal((case.batch, case.time, case.value_heads, case.key_dim))
    if case.gate != "none":
        return raw + case.gate_offset
    g = -np.logaddexp(0, -raw) / case.decay_divisor
    g = np.where(rng.random(g.shape) < case.masked, case.masked_decay, g)
    return np.maximum(g, BOUND) if case.bounded else g


def _beta(case: Case, rng: np.random.Generator) -> np.ndarray:
    raw = rng.standard_normal((case.batch, case.time, case.value_heads))
    offset, factor = {"sigmoid": (0, 1), "one": (7, 1), "double": (1, 2)}[case.beta]
    return factor / (1 + np.exp(-raw - offset))


def _segment_ids(case: Case) -> np.ndarray | None:
    if not case.lengths:
        return None
    ids = np.repeat(np.arange(1, len(case.lengths) + 1), case.lengths)
    row = np.pad(ids, (0, case.time - len(ids))).astype(np.int32)
    return np.broadcast_to(row, (case.batch, case.time))


def make_gate(call: Call | Case, inputs: Inputs) -> Gate:
    """The gate of a case, around the arrays of its inputs."""
    match call.gate:
        case "softplus":
            return SoftplusGate(inputs.a_log, inputs.dt_bias)
        case "lower_bound":
            return LowerBoundGate(inputs.a_log, inputs.dt_bias, BOUND)
    return None


def run(call: Call | Case, inputs: Inputs, implementation: str = "auto") -> tuple[Array, Array]:
    """Calls the operator on the inputs of a case: (o, final_state)."""
    return chunk_kda(
        *inputs[:5],
        gate=make_gate(call, inputs),
        scale=call.scale,
        initial_state=inputs.initial_state,
        segment_ids=inputs.segment_ids,
        normalize_qk=call.normalize_qk,
        implementation=implementation,
        tile=call.tile,
    )


def run_with_gradients(call: Call | Case, inputs: Inputs, implementation: str = "auto") -> dict[str, Array]:
    """Values and gradients of `run` by name: "o", "final_state", and "d" + name for every differentiable input."""
    names = [n for n in Inputs._fields[:8] if getattr(inputs, n) is not None]

    def values(*arrays):
        return run(call, inputs._replace(**dict(zip(names, arrays, strict=True))), implementation)

    (o, final), pull_back = jax.vjp(values, *(getattr(inputs, n) for n in names))
    gradients = pull_back((jnp.asarray(inputs.d_o, o.dtype), jnp.asarray(inputs.d_final_state, final.dtype)))
    return {"o": o, "final_state": final} | {f"d{n}": d for n, d in zip(names, gradients, strict=True)}


_run_with_gradients = jax.jit(run_with_gradients, static_argnums=(0, 2))


def exact(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """Values and gradients of the token recurrence in float64, from the same rounded inputs."""
    call = case.call._replace(tile=None)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
        return jax.tree.map(np.asarray, _run_with_gradients(call, wide, "reference"))


def _public(*shape: int | float | bool | str, **changes) -> Case:
    """One line of the public grid: B, T, H, HV, D, scale, decay divisor, masked, norm inside, gate, dtype, tile.

    `gate`: "decay" and "clipped" are log-decays, the latter clipped at -5.
    """
    B, T, H, HV, D, scale, divisor, masked, norm, gate, dtype, tile = shape
    name = f"B{B}-T{T}-H{H}-HV{HV}-D{D}-{gate}-{dtype}" + "-norm" * norm + f"-x{divisor}" * (divisor != 1)
    fields = {"scale": scale, "decay_divisor": divisor, "masked": masked, "normalize_qk": norm, "tile": tile}
    fields |= {"bounded": gate == "clipped", "gate": "none" if gate in ("decay", "clipped") else gate}
    return Case(name, B, T, H, HV, D, D, dtype=dtype, **fields | changes)


def _packed(D: int, ends: tuple[int, ...], masked: float, *, bounded: bool = False, tile: int = 64) -> Case:
    lengths = tuple(int(n) for n in np.diff((0, *ends)))
    name = f"packed-D{D}-{'-'.join(map(str, ends))}-masked{masked}"
    settings = {"scale": None, "masked": masked, "masked_decay": -1000.0, "bounded": bounded, "tile": tile}
    return Case(name, 1, ends[-1], 4, 4, D, D, lengths=lengths, **settings)


# Source: flash-linear-attention, tests/ops/test_kda.py, the parameters of its chunked tests.
PUBLIC_DENSE = (
    _public(1, 63, 1, 1, 64, 1.0, 1, 0, False, "clipped", "float16", 64),
    _public(2, 500, 3, 3, 60, 1.0, 1, 0, False, "clipped", "float16", 64),
    _public(2, 1000, 3, 3, 64, 0.1, 1, 0.5, False, "decay", "float16", 64),
    _public(3, 1024, 4, 4, 100, 1.0, 0.1, 0, False, "decay", "float16", 64),
    _public(4, 1024, 4, 4, 128, 0.1, 1, 0, False, "clipped", "float16", 64),
    _public(4, 1024, 4, 4, 128, 0.1, 1, 0, True, "clipped", "float16", 64),
    _public(2, 1500, 4, 4, 128, 0.1, 10, 0, False, "softplus", "float16", 64),
    _public(4, 2048, 8, 8, 64, 0.1, 1, 0, False, "lower_bound", "float16", 64),
    _public(2, 1024, 2, 4, 64, 0.1, 1, 0, False, "decay", "float16", 64),
    _public(2, 1024, 2, 8, 64, 0.1, 1, 0, False, "softplus", "float16", 64),
    _public(2, 1024, 4, 8, 128, 0.1, 1, 0, True, "softplus", "float16", 64),
    _public(2, 160, 2, 4, 64, 0.1, 1, 0, False, "lower_bound", "float16", 32),
    _public(2, 1024, 2, 4, 64, 0.1, 1, 0, True, "lower_bound", "bfloat16", 64),
    _public(2, 1024, 2, 4, 64, 0.1, 1, 0, False, "softplus", "bfloat16", 64),
    _public(2, 160, 2, 4, 64, 0.1, 1, 0, False, "lower_bound", "bfloat16", 32),
    _public(2, 1024, 2, 8, 128, 0.1, 1, 0, True, "softplus", "bfloat16", 64),
)
PUBLIC_PACKED = (
    _packed(60, (15,), 0.1),
    _packed(64, (256, 500, 1000), 0.9),
    _packed(128, (256, 500, 1000), 0.5),
    _packed(100, (15, 100, 300, 1200, 2000), 0),
    _packed(256, (100, 300, 1200, 3000, 4096), 0, bounded=True),
    _packed(60, (31, 96, 160), 0, tile=32),
)
_small = functools.partial(Case, batch=2, time=150, heads=2, value_heads=2, key_dim=32, value_dim=32, scale=None)
OWN = (
    _small("float32", dtype="float32"),
    _small("one-token", time=1, dtype="float32"),
    _small("narrow-keys", key_dim=24, value_dim=40, gate="softplus", normalize_qk=True, dtype="float32"),
    _small("narrow-values", key_dim=48, value_dim=16, gate="lower_bound", normalize_qk=True, dtype="float32"),
    _small("grouped", heads=2, value_heads=6, gate="softplus", normalize_qk=True, keys="normal"),
    _small("identical-keys", keys="identical", beta="one", decay_divisor=1e3, dtype="float32"),
    _small("identical-keys-half", keys="identical", beta="one", decay_divisor=10, normalize_qk=True),
    _small("collinear-keys", keys="collinear", beta="one", decay_divisor=1e3, dtype="float32"),
    _small("collinear-keys-half", keys="collinear", beta="one", decay_divisor=10, normalize_qk=True),
    _small("negative-eigenvalues", keys="normal", beta="double", dtype="float32"),
    _small("total-forgetting", masked=0.3, masked_decay=-1000.0),
    _small("never-forgets", masked=1.0, masked_decay=0.0, keys="normal", dtype="float32"),
    _small("no-slope", gate="lower_bound", slope=False, normalize_qk=True),
    _small("bound-reached", gate="lower_bound", gate_offset=40.0, slope=False, normalize_qk=True),
    _small("bound-away", gate="lower_bound", gate_offset=-40.0, slope=False, normalize_qk=True, keys="normal"),
    _small("packed-one-token-documents", lengths=(1, 1, 1, 40, 1, 63, 1, 2, 30), gate="softplus", normalize_qk=True),
    _small("packed-aligned", lengths=(64, 32, 16), gate="lower_bound", normalize_qk=True, dtype="bfloat16"),
)
GRID = PUBLIC_DENSE + PUBLIC_PACKED + OWN
BY_NAME = {case.name: case for case in GRID}
