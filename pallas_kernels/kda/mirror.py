"""The Mosaic GPU kernels of KDA in plain JAX with the same rounding points, so that a CPU can test them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kda import segments_mosaic_gpu
from pallas_kernels.kda.gates import Gate, log_decay_of_rows
from pallas_kernels.kda.prepare_mosaic_gpu import FINE, FORGET, LEVELS, LOG2E, OWN, PADDING, RESET, C, Prepared
from pallas_kernels.kda.reference import L2_EPS

f32, f16 = jnp.float32, jnp.float16
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=f32)


def _round(x):
    """To float16 and back: an operand copy."""
    return x.astype(f16).astype(f32)


def _factors(mask, decay):
    """2 to the sum of the decays that each row of a [C, C] mask marks; the sum and the result are float16."""
    return _round(jnp.exp2(_round(_einsum("ct,zntd->zncd", mask, decay))))


def _by_head(x, group: int = 1):
    """[B, T, H, ...] to [B * HV, N, C, ...], each head repeated `group` times."""
    B, T, H = x.shape[:3]
    x = jnp.repeat(jnp.moveaxis(x, 2, 1), group, axis=1)
    return x.reshape(B * H * group, T // C, C, *x.shape[3:])


def _per_head(code, heads: int):
    """[B, N, C] to [B * HV, N, C]."""
    return jnp.repeat(code, heads, axis=0)


def level_masks() -> np.ndarray:
    """0/1 [LEVELS, C, C]: row i of level n sums the decays between token i and the anchor of its pair of 2^n-blocks."""
    row, column = np.arange(C)[:, None], np.arange(C)[None]
    masks = []
    for n in range(LEVELS):
        b = 1 << n
        anchor = np.where(row & b, row & -b, (row & -b) + b)
        masks.append((column > np.minimum(row, anchor)) & (column <= np.maximum(row, anchor)))
    return np.stack(masks).astype(np.float32)


def prepare(q, k, g, beta, code, gate: Gate, *, scale: float, normalize_qk: bool) -> Prepared:
    """See `prepare_mosaic_gpu.prepare`."""
    HV = g.shape[2]
    group = HV // q.shape[2]

    def unit(x, factor):
        x = x if code is None else jnp.where((code == PADDING).reshape(*x.shape[:2], 1, 1), 0, x)
        x = x.astype(f32)
        if normalize_qk:
            x = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + L2_EPS)
        return _by_head(_round(x * factor), group)

    decay = _by_head((g if gate is None else log_decay_of_rows(gate, g)).astype(f32) * LOG2E)
    if code is not None:
        of_row = _per_head(code, HV)[..., None]
        decay = jnp.where(of_row == 0, decay, jnp.where(of_row == RESET, FORGET, 0.0))
    decay = _round(jnp.maximum(decay, FORGET))
    k, q = unit(k, 1.0), unit(q, scale)
    row, column = np.arange(C)[:, None], np.arange(C)[None]
    own = row // OWN == column // OWN  # the tokens of one warp
    since = _factors((own & (column <= row)).astype(np.float32), decay)
    until = _factors((own & (column > row)).astype(np.float32), decay)
    reads, asks, writes = _round(k * since), _round(q * since), _round(k * until)
    sums = decay.reshape(*decay.shape[:2], C // OWN, OWN, -1).sum(3)

    def between(*ranges):
        """Per row, the decay over whole blocks [first, last), given for each of the four."""
        blocks = [jnp.exp2(jnp.sum(sums[:, :, first:last], 2)) for first, last in ranges]
        return jnp.repeat(_round(jnp.stack(blocks, 2)), OWN, axis=2)

    def level(n):
        """Keys as they ask, queries, keys as they are asked."""
        if n < FINE:
            span = _factors(level_masks()[n], decay)
            return _round(k * span), _round(q * span), _round(k * span)
        if n == FINE:
            return reads, asks, writes
        across = between((1, 2), (0, 0), (0, 0), (2, 3))
        return _round(reads * across), _round(asks * across), _round(writes * across)

    t = jnp.broadcast_to(jnp.asarray(row == column, f32), (*k.shape[:2], C, C))
    aqk = _round(_einsum("zncd,zned->znce", q, k)) * t
    for n in range(LEVELS):
        pair = ((row ^ column) >> n == 1) & (row > column)
        left, queries, right = level(n)
        aqk = aqk + jnp.where(pair, _round(_einsum("zncd,zned->znce", queries, right)), 0)
        part = jnp.where(pair, _round(-beta[..., None] * _einsum("zncd,zned->znce", left, right)), 0)
        right = _round(_einsum("znce,znef->zncf", part, _round(t)))
        t = t + _einsum("znce,znef->zncf", _round(t), right)
    before, after = between((0, 0), (0, 1), (0, 2), (0, 3)), between((1, 4), (2, 4), (3, 4), (4, 4))
    operands = (x.astype(f16) for x in (reads * before, writes * after, asks * before, t, aqk))
    return Prepared(*operands, jnp.exp2(jnp.sum(decay, 2)))


def run_segments(prepared: Prepared, v, beta, code, entering, *, keep: bool, split: int, segments: int):
    """See `chunk_mosaic_gpu.run_segments`."""
    del split  # decides only which multiprocessor computes what
    B, T, HV, V = v.shape
    BH, N, _, K = prepared.kg.shape
    first = jnp.zeros((BH * segments, V, K), f32) if entering is None else entering.reshape(-1, V, K)
    chunks = [_cut(x, segments) for x in (*prepared, beta, _values(v, code))]
    states, (o, *kept) = _advance(first, *chunks)
    o, *kept = (x.reshape(BH, N, *x.shape[2:]) for x in (o, *kept))
    o = jnp.moveaxis(o.reshape(B, HV, T, V), 1, 2).astype(v.dtype)
    return o, states.reshape(BH, segments, V, K), tuple(kept) if keep else None


def segment_maps(prepared: Prepared, v, beta, code, *, segments: int, last: bool = False):
    """See `segments_mosaic_gpu.segment_maps`."""
    V, (BH, _, _, K) = v.shape[-1], prepared.kg.shape
    values = _values(v, code)
    values = jnp.concatenate([values, jnp.zeros((*values.shape[:-1], K), values.dtype)], -1)
    first = jnp.broadcast_to(jnp.eye(V + K, K, -V), (BH * segments, V + K, K))
    maps, _ = _advance(first, *(_cut(x, segments) for x in (*prepared, beta, values)))
    maps = maps.reshape(BH, segments, V + K, K)[:, : segments if last else segments - 1]
    return maps[:, :, :V], maps[:, :, V:]


def _values(v, code):
    values = _by_head(v)
    return values if code is None else jnp.where((_per_head(code, v.shape[2]) == PADDING)[..., None], 0, values)


def _cut(x, segments: int):
    """[BH, N, ...] to [BH * segments, N / segments, ...]."""
    return x.reshape(x.shape[0] * segments, -1, *x.shape[2:])


def _advance(first, *chunks):
    """Returns (leaving states, (O, entering states, R) per chunk); all of `chunks` start with [sequences, chunks]."""

    def step(state, inputs):
        kg, kr, qg, t, aqk, gamma, beta, v = (x.astype(f32) for x in inputs)
        state16 = _round(state)
        error = v - _einsum("zck,zvk->zcv", kg, state16)
        new = _round(_einsum("zce,zev->zcv", t, _round(beta[..., None] * error)))
        o = _einsum("zck,zvk->zcv", qg, state16) + _einsum("zce,zev->zcv", aqk, new)
        state = gamma[:, None] * state + _einsum("zcv,zck->zvk", new, kr)
        return state, (o, state16.astype(f16), error.astype(f16))

    state, results = jax.lax.scan(step, first, tuple(jnp.moveaxis(x, 1, 0) for x in chunks))
    return state, tuple(jnp.moveaxis(x, 0, 1) for x in results)


recur = functools.partial(segments_mosaic_gpu.recur, run=run_segments, find_maps=segment_maps)
