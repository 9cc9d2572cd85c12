"""KDA on Hopper: which arguments the Mosaic GPU kernels serve, and how any others are brought into their shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import relay
from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import refuse_device
from pallas_kernels.kda.chunk_mosaic_gpu import blocks_per_head
from pallas_kernels.kda.chunk_mosaic_gpu_vjp import backward
from pallas_kernels.kda.gates import Gate
from pallas_kernels.kda.prepare_mosaic_gpu import PADDING, RESET, C, prepare
from pallas_kernels.kda.segments_mosaic_gpu import count_segments, fill_chunks, recur
from pallas_kernels.segments import segment_starts

WIDEST = 128  # key and value channels
DTYPES = (jnp.bfloat16, jnp.float16)
GATE_DTYPES = (*DTYPES, jnp.float32)


class Options(NamedTuple):
    """What is fixed at trace time; the functions are the kernels, or their mirrors on a CPU."""

    scale: float
    normalize_qk: bool
    prepare: Callable = prepare
    recur: Callable = recur
    backward: Callable = backward
    count_segments: Callable = count_segments
    axis: str | None = None  # over which time is cut, see `pallas_kernels.relay`

    def count(self, v: Float[Array, "B T HV V"]) -> int:
        """Segments of time, without regard to members of `jax.vmap`: of cotangents there may be more than of inputs."""
        B, T, HV, V = v.shape
        return self.count_segments(T // C, _blocks(B * HV, V), mapped=self.axis is not None)


def _blocks(heads: int, channels: int) -> int:
    """Multiprocessors that one segment of all heads keeps busy."""
    return heads * blocks_per_head(channels, heads)


def refuse(q, k, v, g, beta, *, tile, **_) -> str | None:
    """Refuses all but Hopper GPUs, 16-bit inputs and at most 128 channels."""
    return refuse_device() or unserved(q, k, v, g, tile)


def unserved(q, k, v, g, tile: int | None) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k, v must share bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if g.dtype not in GATE_DTYPES:
        return f"g must be bfloat16, float16 or float32, got {g.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"K={q.shape[-1]}, V={v.shape[-1]}: at most {WIDEST}"
    if tile not in (None, C):
        return f"tile={tile}: the chunk is {C}"
    return None


def chunk_kda(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    gate: Gate,
    scale: float,
    initial_state: Float[Array, "B HV V K"] | None,
    segment_ids: Int[Array, "B T"] | None,
    normalize_qk: bool,
    tile: int | None,
    axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"]]:
    """See `pallas_kernels.kda.api.chunk_kda`. What the forward keeps for the backward: 1.8 KB per token and head."""
    del tile
    options = Options(float(scale), normalize_qk, axis=axis)
    return padded(options, q, k, v, g, beta, gate, initial_state, segment_ids)


def chunk_kda_with_states(
    *arrays, every: int, gate: Gate, scale: float, initial_state, segment_ids, normalize_qk: bool, tile: int | None
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"], Float[Array, "B N HV V K"]]:
    """See `pallas_kernels.kda.api.chunk_kda_with_states`: the float16 states that the backward pass would read."""
    del tile
    options = Options(float(scale), normalize_qk)
    return padded(options, *arrays, gate, initial_state, segment_ids, every=every)


def padded(options: Options, q, k, v, g, beta, gate: Gate, initial_state, segment_ids, *, every: int | None = None):
    """Pads time to whole chunks and channels to whole tiles, as many for keys as for values; cuts the results back.

    `every`: return the states after every so many tokens as well, without gradients.
    """
    (B, T, HV, V), K = v.shape, q.shape[-1]
    width = C * pl.cdiv(max(K, V), C)
    time = fill_chunks(pl.cdiv(T, C), _blocks(B * HV, width)) * C - T
    keys, values = width - K, width - V

    def pad(x, *trailing):  # batch first, then time
        return jnp.pad(x, ((0, 0), (0, time), *((0, n) for n in trailing))) if time or any(trailing) else x

    q, k, g = (pad(x, 0, keys) for x in (q, k, g))
    v, beta = pad(v, 0, values), pad(beta, 0)
    code = None
    if segment_ids is not None or time:
        code = pad_code(segment_ids, B, T, time)
    if gate is not None and keys:
        gate = dataclasses.replace(gate, dt_bias=jnp.pad(gate.dt_bias, ((0, 0), (0, keys))))
    if initial_state is not None and (keys or values):
        initial_state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, values), (0, keys)))
    continued = relay.continues(segment_ids, options.axis) if options.axis else None
    arrays = (q, k, v, g, beta, gate_of_rows(gate, B), initial_state, code, continued)
    if every is None:
        o, final = _core(options, *arrays)
        final = relay.of_last_device(final, options.axis) if options.axis else final
        return o[:, :T, :, :V], final[:, :, :V, :K]
    o, final, (_, _, entering, _, _) = forward(options, *arrays, keep=True)
    states = jnp.concatenate([_split_heads(entering, final).astype(final.dtype), final[:, :, None]], 2)
    states = jnp.moveaxis(states[:, :, every // C : T // C + 1 : every // C], 1, 2)
    return o[:, :T, :, :V], final[:, :, :V, :K], states[..., :V, :K]


def _split_heads(x: Float[Array, "BH ..."], like: Float[Array, "B HV ..."]) -> Float[Array, "B HV ..."]:
    return x.reshape(*like.shape[:2], *x.shape[1:])


def gate_of_rows(gate: Gate, batch: int) -> Gate:
    """The gate once per row of the batch: several models have several. Float32, in which its gradients add up."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x.astype(jnp.float32), (batch, *x.shape)), gate)


def pad_code(segment_ids, batch: int, length: int, extra: int) -> Int[Array, "B N C"]:
    """The code of every token (see `prepare`), with `extra` tokens of padding at the end."""
    if segment_ids is None:
        code = jnp.zeros((batch, length), jnp.int32)
    else:
        code = jnp.where(segment_ids == 0, PADDING, jnp.where(segment_starts(segment_ids), RESET, 0))
    code = jnp.pad(code.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=PADDING)
    return code.reshape(batch, -1, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(options: Options, *inputs):
    return forward(options, *inputs, keep=False)[:2]


def forward(options: Options, q, k, v, g, beta, gate: Gate, initial_state, code, continued=None, *, keep: bool):
    """Both kernels, on whole chunks and tiles; the gate has the rows of the batch first.

    Returns:
      (o, final state [B, HV, V, K], residuals or None): residuals are (prepared, beta per chunk, entering states, R,
      M of the segments or None).
    """
    run = by_rows(functools.partial(_run_kernels, options, keep, options.count(v)))
    return run(q, k, v, g, beta, gate, initial_state, code, continued)


def _run_kernels(
    options: Options, keep: bool, segments: int, q, k, v, g, beta, gate: Gate, initial_state, code, continued
):
    B, T, HV, V = v.shape
    steps = jnp.moveaxis(beta.astype(jnp.float32), 2, 1).reshape(B, HV, T // C, C)
    if code is not None:
        steps = jnp.where(code[:, None] == PADDING, 0.0, steps)
    steps = steps.reshape(B * HV, T // C, C)
    prepared = options.prepare(q, k, g, steps, code, gate, scale=options.scale, normalize_qk=options.normalize_qk)
    first = None if initial_state is None else initial_state.astype(jnp.float32).reshape(B * HV, V, -1)
    split = blocks_per_head(V, B * HV)
    enter = functools.partial(_enter, options.axis, continued, (B, HV)) if options.axis else None
    o, final, kept, applied = options.recur(
        *(prepared, v, steps, code, first), keep=keep, split=split, segments=segments, enter=enter
    )
    return o, final.reshape(B, HV, V, -1), (prepared, steps, *kept, applied) if keep else None


def _enter(axis: str, continued, heads: tuple[int, int], added, applied):
    """The state from the devices before, given the map of this device's span."""
    added, applied = (x.reshape(*heads, *x.shape[1:]) for x in (added, applied))
    state = relay.keep(continued, relay.entering_state(added, relay.keep(continued, applied), axis))
    return state.reshape(-1, *state.shape[2:])


def _core_forward(options: Options, *inputs):
    o, final, kept = forward(options, *inputs, keep=True)
    o, kept = jax.tree.map(lambda x: checkpoint_name(x, "operators"), (o, kept))  # kept or recomputed by that name
    return (o, final), (inputs, kept)


def _core_backward(options: Options, residuals, cotangents):
    inputs, kept = residuals
    q, k, _, g, beta, gate, initial_state, code, continued = inputs
    B, T, HV = beta.shape
    d = by_rows(functools.partial(_run_back, options))(q, k, g, gate, code, continued, kept, *cotangents)
    d_beta = jnp.moveaxis(d.beta.reshape(B, HV, T), 1, 2).astype(beta.dtype)
    d_gate = None if gate is None else dataclasses.replace(gate, a_log=d.a_log, dt_bias=d.dt_bias)
    d_initial = None if initial_state is None else d.initial_state.astype(initial_state.dtype)
    return d.q, d.k, d.v, d.g, d_beta, d_gate, d_initial, None, None


def _run_back(options: Options, q, k, g, gate: Gate, code, continued, kept, d_o, d_final):
    prepared, steps, states, errors, applied = kept
    B, T = d_o.shape[:2]
    leave = None
    padding = None if code is None else (code == PADDING).reshape(B, T)
    size = cotangent_scale(d_o, d_final, padding, options.axis)
    if options.axis:
        leave = functools.partial(_leave, options.axis, continued, d_final * size[:, :, None, None])
    return options.backward(
        *(q, k, g, steps, code, gate, prepared, states, errors, applied, d_o, d_final, size),
        **dict(scale=options.scale, normalize_qk=options.normalize_qk, leave=leave),
    )


def cotangent_scale(
    do: Float[Array, "B T HV V"],
    dfinal: Float[Array, "B HV V K"],
    padding: Bool[Array, "B T"] | None,
    axis: str | None = None,
) -> Float[Array, "B HV"]:
    """The power of two per row and head that brings the largest cotangent into [0.5, 1), so that float16 holds them.

    The same on all devices of `axis`, which hand each other gradients in this scale.
    """
    size = jnp.abs(do.astype(jnp.float32))
    if padding is not None:
        size = jnp.where(padding[..., None, None], 0.0, size)
    of_tokens = lax.optimization_barrier(jnp.max(size, axis=3))  # along memory first: 27 us for 33, of 32768 tokens
    final = jnp.abs(lax.optimization_barrier(dfinal))  # mostly zeros that XLA would fold for seconds
    largest = jnp.maximum(jnp.max(of_tokens, axis=1), jnp.max(final, axis=(2, 3)))
    largest = lax.pmax(largest, axis) if axis else largest
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(-exponent, -100, 100))


def _leave(axis: str, continued, d_final, added, applied):
    """The gradient of the state that leaves this device's span, given the map of gradients over it."""
    added, applied = (x.reshape(*d_final.shape[:2], *x.shape[1:]) for x in (added, applied))
    d_entering = jnp.einsum("...vk,...kc->...vc", d_final, applied, precision=lax.Precision.HIGHEST) + added
    d_entering, applied = (relay.keep(continued, x) for x in (d_entering, applied))
    d_final += relay.leaving_gradient(d_entering, applied.mT, axis)
    return d_final.reshape(-1, *d_final.shape[2:])


_core.defvjp(_core_forward, _core_backward)
