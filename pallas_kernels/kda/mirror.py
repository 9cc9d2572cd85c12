"""The Mosaic GPU kernels of KDA in plain JAX with the same rounding points, so that a CPU can test them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kda.gates import Gate
from pallas_kernels.kda.prepare_mosaic_gpu import FORGET, LEVELS, LOG2E, PADDING, RESET, C, Prepared
from pallas_kernels.kda.reference import L2_EPS

f32, f16 = jnp.float32, jnp.float16
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=f32)


def _round(x):
    """To float16 and back: an operand copy."""
    return x.astype(f16).astype(f32)


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

    decay = _by_head((g if gate is None else gate.log_decay(g)).astype(f32) * LOG2E)
    if code is not None:
        of_row = _per_head(code, HV)[..., None]
        decay = jnp.where(of_row == 0, decay, jnp.where(of_row == RESET, FORGET, 0.0))
    decay = _round(jnp.maximum(decay, FORGET))
    k, q = unit(k, 1.0), unit(q, scale)
    row, column = np.arange(C)[:, None], np.arange(C)[None]
    t = jnp.broadcast_to(jnp.asarray(row == column, f32), (*k.shape[:2], C, C))
    aqk = _round(_einsum("zncd,zned->znce", q, k)) * t
    for n, mask in enumerate(level_masks()):
        span = _round(jnp.exp2(_einsum("ct,zntd->zncd", mask, decay)))
        pair = ((row ^ column) >> n == 1) & (row > column)
        keys, queries = _round(k * span), _round(q * span)
        aqk = aqk + jnp.where(pair, _round(_einsum("zncd,zned->znce", queries, keys)), 0)
        part = jnp.where(pair, _round(-beta[..., None] * _einsum("zncd,zned->znce", keys, keys)), 0)
        right = _round(_einsum("znce,znef->zncf", part, _round(t)))
        t = t + _einsum("znce,znef->zncf", _round(t), right)
    entering = _round(jnp.exp2(_einsum("ct,zntd->zncd", (column <= row).astype(f32), decay)))
    leaving = _round(jnp.exp2(_einsum("ct,zntd->zncd", (column > row).astype(f32), decay)))
    operands = (x.astype(f16) for x in (k * entering, k * leaving, q * entering, t, aqk))
    return Prepared(*operands, jnp.exp2(jnp.sum(decay, 2)))


def recur(prepared: Prepared, v, beta, code, initial_state, *, keep: bool, split: int = 1):
    """See `chunk_mosaic_gpu.recur`."""
    del split  # decides only which multiprocessor computes what
    B, T, HV, V = v.shape
    BH, _, _, K = prepared.kg.shape
    values = _by_head(v)
    if code is not None:
        values = jnp.where((_per_head(code, HV) == PADDING)[..., None], 0, values)

    def step(state, inputs):
        kg, kr, qg, t, aqk, gamma, beta, v = (x.astype(f32) for x in inputs)
        state16 = _round(state)
        error = v - _einsum("zck,zvk->zcv", kg, state16)
        new = _round(_einsum("zce,zev->zcv", t, _round(beta[..., None] * error)))
        o = _einsum("zck,zvk->zcv", qg, state16) + _einsum("zce,zev->zcv", aqk, new)
        state = gamma[:, None] * state + _einsum("zcv,zck->zvk", new, kr)
        return state, (o, state16.astype(f16), error.astype(f16))

    first = jnp.zeros((BH, V, K), f32) if initial_state is None else initial_state
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*prepared, beta, values))
    state, (o, states, errors) = jax.lax.scan(step, first, xs)
    o = jnp.moveaxis(jnp.moveaxis(o, 0, 1).reshape(B, HV, T, V), 1, 2).astype(v.dtype)
    return o, state, (jnp.moveaxis(states, 0, 1), jnp.moveaxis(errors, 0, 1)) if keep else None
