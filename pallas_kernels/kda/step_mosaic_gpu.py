"""KDA on Hopper, decoding: a few tokens per sequence, the state read once, held in registers and written in place."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import MULTIPROCESSORS, refuse_device
from pallas_kernels.kda.gates import Gate, LowerBoundGate, SoftplusGate
from pallas_kernels.kda.reference import L2_EPS

f32 = jnp.float32
LOG2E = math.log2(math.e)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
STATE_DTYPES = (jnp.float32, jnp.bfloat16)
LINE, STRIPE = 32, 16  # key channels per memory line, value rows that one warpgroup covers at a time
WIDEST = 128  # key channels: what fits in registers

# Values x keys. Eight lanes share a row and read a line of 128 bytes of it together, a warp has four rows: a sum over
# keys is one over registers and three shuffles.
STATE = plgpu.Layout.TILED(
    fragmented_array.Tiling(((STRIPE, LINE), (4, LINE), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
VALUES, KEYS = STATE.reduce(1), STATE.reduce(0)


def refuse(q, k, v, g, beta, state, **_) -> str | None:
    """Refuses all but Hopper GPUs, and what the layout of the state does not cover."""
    return refuse_device() or unserved(q, k, v, g, state)


def unserved(q, k, v, g, state) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    if unknown := [x.dtype for x in (q, k, v, g) if x.dtype not in DTYPES]:
        return f"q, k, v, g must be bfloat16, float16 or float32, got {unknown[0]}"
    if state.dtype not in STATE_DTYPES:
        return f"the state must be float32 or bfloat16, got {state.dtype}"
    (V, K) = state.shape[-2:]
    if K % LINE or K > WIDEST or V % STRIPE:
        return f"K={K}, V={V}: K must be a multiple of {LINE} up to {WIDEST}, V of {STRIPE}"
    return None


def value_rows(heads: int, V: int) -> int:
    """Value rows per block: 32, or fewer where that would leave multiprocessors without a block."""
    return STRIPE if V % 32 or heads * V // 32 < MULTIPROCESSORS else 32


def step_kda(
    q: Float[Array, "N T H K"],
    k: Float[Array, "N T H K"],
    v: Float[Array, "N T HV V"],
    g: Float[Array, "N T HV K"],
    beta: Float[Array, "N T HV"],
    state: Float[Array, "P HV V K"],
    *,
    gate: Gate,
    scale: float,
    normalize_qk: bool,
    slots: Int[Array, "N"] | None,
    accepted: Int[Array, "N"] | None,
    rows: int | None = None,
) -> tuple[Float[Array, "N T HV V"], Float[Array, "P HV V K"]]:
    """See `pallas_kernels.kda.api.step_kda`; `rows` of the values per block."""
    settings = {"scale": scale, "normalize_qk": normalize_qk, "rows": rows}
    one = jax.tree.map(lambda x: x[None], (q, k, v, g, beta, state, gate, slots, accepted))
    return jax.tree.map(lambda x: x[0], by_rows(functools.partial(_step_models, **settings))(*one))


def _step_models(q, k, v, g, beta, state, gate: Gate, slots, accepted, *, scale, normalize_qk, rows: int | None):
    """Every array has the models first: under `jax.vmap` several, each with its gate and its pool of states."""
    M, N = q.shape[:2]
    sequences = jax.tree.map(lambda x: x.reshape(M * N, *x.shape[2:]), (q, k, v, g, beta))
    (_, T, H, K), (HV, V) = sequences[0].shape, v.shape[3:]
    rows = rows or value_rows(M * N * HV, V)
    optional = {
        "a_log": None if gate is None else gate.a_log,
        "dt_bias": None if gate is None else gate.dt_bias,
        "slots": slots,
        "accepted": accepted,
    }
    given = {name: x for name, x in optional.items() if x is not None}

    def kda_step(q, k, v, g, beta, *refs):
        *refs, pool, o = refs
        parameters = dict(zip(given, refs, strict=True))
        s, hv, mine = lax.axis_index("sequence"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * rows, rows)
        h = lax.div(hv, HV // H)
        m, n = (lax.div(s, N), lax.rem(s, N)) if M > 1 else (0, s)
        slot = parameters["slots"][m, n] if "slots" in given else n
        last = parameters["accepted"][m, n] if "accepted" in given else T

        def column(ref):
            return plgpu.load(ref, layout=KEYS, optimized=False)

        def fetch(t):
            value = plgpu.load(v.at[s, t, hv, mine], layout=VALUES, optimized=False)
            return column(k.at[s, t, h]), column(q.at[s, t, h]), column(g.at[s, t, hv]), value, beta[s, t, hv]

        def total(x):  # over keys, once per value row
            return jnp.sum(x if x.ndim == 2 else _by_key(x, (rows, K)), 1)

        bias = column(parameters["dt_bias"].at[m, hv]).astype(f32) if gate is not None else None
        slope = jnp.exp2(parameters["a_log"][m, hv].astype(f32) * LOG2E) if "a_log" in given else 1.0

        def token(t, inputs, state):
            key, query, raw, value, step = (x.astype(f32) for x in inputs)
            key_norm, query_norm = 1.0, scale
            if normalize_qk:
                key_norm, query_norm = (lax.rsqrt(total(x * x) + L2_EPS) for x in (key, query))
                query_norm *= scale
            state = state * _by_key(_decay(gate, raw, bias, slope), state.shape)
            error = (value - total(state * _by_key(key, state.shape)) * key_norm) * step
            write = error * key_norm
            # What the query reads after the update, from the state before it: one pass over the state.
            read = total(state * _by_key(query, state.shape)) + write * total(key * query)
            o.at[s, t, hv, mine][...] = (read * query_norm).astype(o.dtype)
            return state + _by_value(write, state.shape) * _by_key(key, state.shape)

        def store(state):
            pool.at[m, slot, hv, mine][...] = state.astype(pool.dtype)

        @pl.when(slot >= 0)
        def _():
            state = plgpu.load(pool.at[m, slot, hv, mine], layout=STATE, optimized=False).astype(f32)
            if T == 1 and accepted is None:
                return store(token(0, fetch(0), state))

            @pl.loop(0, T, init_carry=(state, fetch(0)))
            def _(t, carry):
                state, inputs = carry
                following = fetch(jnp.minimum(t + 1, T - 1))  # on its way meanwhile
                state = token(t, inputs, state)
                pl.when(t + 1 == last)(lambda: store(state))
                return state, following

        if slots is not None:

            @pl.when(slot < 0)
            def _():
                @pl.loop(0, T)
                def _(t):
                    o.at[s, t, hv, mine][...] = plgpu.layout_cast(jnp.zeros(rows, o.dtype), VALUES)

    launch = plgpu.kernel(
        kda_step,
        out_type=jax.ShapeDtypeStruct((M * N, T, HV, V), v.dtype),
        grid=(M * N, HV, V // rows),
        grid_names=("sequence", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    pool = jax.new_ref(state)
    o = launch(*sequences, *given.values(), pool)
    return o.reshape(v.shape), jax.freeze(pool)


def _by_value(x, shape):
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0,)), STATE)


def _by_key(x, shape):
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (1,)), STATE)


def _decay(gate: Gate, raw, bias, slope):
    """exp of the log-decay, whose formulas are those of `gates`."""
    if gate is None:
        return jnp.exp2(raw * LOG2E)
    z = raw + bias
    if isinstance(gate, SoftplusGate):
        return jnp.exp2(-slope * LOG2E * _softplus(z))
    assert isinstance(gate, LowerBoundGate)
    return jnp.exp2(gate.bound * LOG2E / (1.0 + jnp.exp2(-slope * LOG2E * z)))


def _softplus(z):
    """max(z, 0) + log1p(exp(-|z|)). The logarithm as a series, 2 artanh(x / (2 + x)): the fast one of the hardware is
    accurate to 1e-7 absolutely, which is nothing of a slow decay; the terms left out are 2e-8 of the sum."""
    x = jnp.exp2(-LOG2E * jnp.abs(z))
    s = x / (2.0 + x)
    square = s * s
    series = 1 / 15
    for n in (13, 11, 9, 7, 5, 3, 1):
        series = series * square + 1 / n
    return jnp.maximum(z, 0.0) + 2.0 * s * series
