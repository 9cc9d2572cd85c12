"""The backward kernels of KDA in plain JAX with the same rounding points: what `chunk_mosaic_gpu_vjp` must compute."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.kda.gates import Gate, LowerBoundGate, SoftplusGate
from pallas_kernels.kda.prepare_mosaic_gpu import FINE, FORGET, LEVELS, LOG2E, PADDING, RESET, C
from pallas_kernels.kda.reference import L2_EPS
from pallas_kernels.kda.segments_mosaic_gpu import recur_back

LN2 = 0.6931471805599453
f16, f32, bf16 = jnp.float16, jnp.float32, jnp.bfloat16

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=f32)


class Gradients(NamedTuple):
    """Of every input of `chunk_kda`; None where there is no such input."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    g: Float[Array, "B T HV K"]
    beta: Float[Array, "BH N C"]
    a_log: Float[Array, "B HV"] | None
    dt_bias: Float[Array, "B HV K"] | None
    initial_state: Float[Array, "B HV V K"]


def _round(x, dtype=f16):
    """Rounds and widens; the barrier keeps the compiler from dropping the pair of conversions."""
    return lax.optimization_barrier(x.astype(dtype)).astype(f32)


def reverse_chain(prepared, beta, do_scale, do, leaving, *, segments: int | None = None, keep: bool = True):
    """See `chain_mosaic_gpu_vjp.reverse_chain`."""
    (BH, N), (found, V, K) = beta.shape[:2], leaving.shape[1:]
    first = N - N // (segments or found) * found

    def chunk(ds, x):
        kg, kr, qg, t, aqk, gamma, beta, do = (y.astype(f32) for y in x)
        ds16 = _round(ds)
        dvn = _einsum("ziv,zij->zvj", do, aqk) + _einsum("zvk,zjk->zvj", ds16, kr)
        p = _einsum("zvi,zij->zvj", _round(dvn), t)
        dv = _round(-p * beta[:, None])
        before = ds * gamma[:, None] + _einsum("ziv,zik->zvk", do, qg) + _einsum("zvj,zjk->zvk", dv, kg)
        return before, (ds16.astype(f16), p.astype(f16))

    cut = lambda x: x[:, first:].reshape(BH * found, -1, *x.shape[2:])
    xs = tuple(jnp.moveaxis(cut(x), 1, 0) for x in (*prepared, beta, _scaled(do, do_scale)))
    entering, chunks = lax.scan(chunk, leaving.reshape(BH * found, V, K), xs, reverse=True)
    ds, p = (jnp.moveaxis(x, 0, 1).reshape(BH, -1, *x.shape[2:]) for x in chunks)
    return entering.reshape(leaving.shape), (ds, jnp.swapaxes(p, -1, -2)) if keep else None


def _scaled(do, do_scale):
    """The cotangent of o by chunk, [BH,N,C,V] float16, times a factor per token; 0 where the factor is."""
    do = _by_chunk(do, do.shape[2]).reshape(*do_scale.shape, -1).astype(f32)
    return jnp.where(do_scale[..., None] > 0, do * do_scale[..., None], 0).astype(f16)


def level_masks() -> np.ndarray:
    """0/1 [LEVELS, C, C]: the decays between token i and the end of the first block of its pair of 2^n-blocks.

    The forward ends at the token after: the same product of two factors, but these stay inside their blocks.
    """
    row, column = np.arange(C)[:, None], np.arange(C)[None]
    masks = []
    for n in range(LEVELS):
        start = row >> n << n
        until, since = (row < column) & (column < start + (1 << n)), (start <= column) & (column <= row)
        masks.append(np.where(row >> n & 1, since, until))
    return np.stack(masks).astype(np.float32)


def _normalize(x, normalize_qk):
    x = x.astype(f32)
    rstd = lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + L2_EPS) if normalize_qk else jnp.ones((*x.shape[:-1], 1))
    return _round(x * rstd), rstd


def gate_and_slope(gate: Gate, raw):
    """(log-decay in nats, its derivative by the raw logit), float32, for [B, HV, NT, C, K]."""
    if gate is None:
        return raw, jnp.ones_like(raw)
    z = raw + gate.dt_bias[:, :, None, None, :]
    rate = 1.0 if gate.a_log is None else jnp.exp(gate.a_log)[:, :, None, None, None]
    if isinstance(gate, SoftplusGate):
        return -rate * jax.nn.softplus(z), -rate * jax.nn.sigmoid(z)
    s = jax.nn.sigmoid(rate * z)
    return gate.bound * s, gate.bound * rate * s * (1 - s)


def _rate_gradient(gate, raw, g, dg, draw):
    return draw * (raw + gate.dt_bias[:, :, None, None, :]) if isinstance(gate, LowerBoundGate) else dg * g


def _pair_matrices(vn, p, do, scale):
    """Gradients of Aqk (off the diagonal, and on it) and of L / beta, each with its transpose above the diagonal."""
    row, col = np.arange(C)[:, None], np.arange(C)[None]
    lower, upper = _einsum("...iv,...jv->...ij", do, vn), _einsum("...iv,...jv->...ij", vn, do)
    da_diagonal = scale * jnp.sum(jnp.where(row == col, lower, 0), -1, keepdims=True)
    da = _round(scale * jnp.where(row > col, lower, upper))
    lower, upper = _einsum("...iv,...jv->...ij", p, vn), _einsum("...iv,...jv->...ij", vn, p)
    return da, da_diagonal, _round(-jnp.where(row > col, lower, upper))


def _level_gradients(level, *, through, keys, queries, beta, da, dl):
    """The pairs of one level: what they add to the gradients (dq, w, down) of `chunk_gradients`, and to that of G.

    Args:
      through: mask [C, C] -> exp2 of the sums of log-decays over it.
      beta: rounded, [B,HV,NT,C,1]; da, dl: of `_pair_matrices`.
    """
    row, col = np.arange(C)[:, None], np.arange(C)[None]
    odd = (row >> level & 1) == 1  # rows in a second block
    pair = (row ^ col) >> level == 1
    factor = through(level_masks()[level])
    kf, qf = _round(keys * _round(factor)), _round(queries * _round(factor))
    # beta multiplies the keys here: in dL, rounded for all channels at once, it would not cancel in dg.
    read = jnp.where(odd, _round(kf * beta), kf)
    by_a = _einsum("...ij,...jd->...id", jnp.where(pair, da, 0), jnp.where(odd, qf, kf))
    by_l = _einsum("...ij,...jd->...id", jnp.where(pair, dl, 0), read)
    new = jnp.where(odd, factor * by_a, 0), jnp.where(odd, factor * by_l, 0), jnp.where(odd, 0, factor * (by_a + by_l))
    return new, jnp.where(odd, qf * by_a + read * by_l, -kf * (by_a + by_l))


def _sum_later(dg_row, boundary, start):
    """Sums rows from each token to the end of its document or, with the `boundary` there, of the chunk."""
    high = _round(dg_row, bf16)
    low = _round(dg_row - high, bf16)
    behind = jnp.sum(start, -2, keepdims=True) - jnp.cumsum(start, -2)  # documents that start behind the token
    same = behind == jnp.swapaxes(behind, -1, -2)
    row, col = np.arange(C)[:, None], np.arange(C)[None]
    later = jnp.broadcast_to(jnp.where(row <= col, same, False), (*dg_row.shape[:-1], C)).astype(f32)
    suffix = partial(_einsum, "...ti,...id->...td", later)
    return suffix(high) + suffix(low) + jnp.where(behind == 0, boundary[..., None, :], 0)


def chunk_gradients(q, k, raw, beta, code, t, gamma, h, r, ds, p, do, unscale, gate: Gate, *, scale, normalize_qk):
    """Gradients of every input inside its chunk.

    Args:
      q, k, raw: inputs by chunk, [B,HV,NT,C,K]; beta [B,HV,NT,C]; code [B,1,NT,C]: 0 token, 1 start, 2 padding.
      t, gamma: from the preparation; h, r: state entering the chunk and V - Kg S, from the forward recurrence.
      ds, p: of `reverse_chain`; do: of `_scaled`; unscale: reciprocal of the cotangents' scale, [B,HV,1,1,1].

    Returns:
      dq, dk, dv, draw [B,HV,NT,C,K or V], dbeta [B,HV,NT,C], da_log [B,HV], ddt_bias [B,HV,K] (None
      without a gate), float32.
    """
    token, start = (code != PADDING)[..., None], (code == RESET)[..., None]
    q, k, raw = (jnp.where(token, x.astype(f32), 0) for x in (q, k, raw))
    qn, q_rstd = _normalize(q, normalize_qk)
    kn, k_rstd = _normalize(k, normalize_qk)
    g, slope = gate_and_slope(gate, raw)
    g2 = _round(jnp.where(token, jnp.where(start, FORGET, jnp.maximum(g * LOG2E, FORGET)), 0))
    t, h, r, ds, p, do = (x.astype(f32) for x in (t, h, r, ds, p, do))

    vn = _round(_einsum("...ij,...jv->...iv", t, _round(r * beta[..., None])))
    row, col = np.arange(C)[:, None], np.arange(C)[None]
    da, da_diagonal, dl = _pair_matrices(vn, p, do, scale)
    through = partial(_einsum, "it,...td->...id")
    from_entry = jnp.exp2(through((row >= col).astype(np.float32), g2))
    to_exit = jnp.exp2(through((row < col).astype(np.float32), g2))
    dq = scale * from_entry * _einsum("...iv,...vk->...ik", do, h)
    w = -from_entry * _einsum("...iv,...vk->...ik", p, h)  # gradient of k_i where it carries +G_i, over beta_i
    kappa = to_exit * _einsum("...iv,...vk->...ik", vn, ds)
    boundary = jnp.sum(kn * kappa, -2) + gamma * jnp.sum(h * ds, -2)
    dbeta = jnp.sum(p * r, -1) - jnp.sum(kn * w, -1)
    down = kappa  # gradient of k_j where it carries -G_j
    beta16 = _round(beta)[..., None]
    decay = lambda mask: jnp.exp2(through(mask, g2))
    of_level = partial(_level_gradients, through=decay, keys=kn, queries=qn, beta=beta16, da=da, dl=dl)
    for level in range(FINE, LEVELS):
        dq, w, down = (x + y for x, y in zip((dq, w, down), of_level(level)[0], strict=True))
    dg_row = qn * dq + kn * (beta16 * w - down)
    for level in range(FINE):
        new, of_decay = of_level(level)
        dq, w, down, dg_row = (x + y for x, y in zip((dq, w, down, dg_row), (*new, of_decay), strict=True))
    dq, down = dq + da_diagonal * kn, down + da_diagonal * qn
    dbeta = dbeta + jnp.sum(kn * w, -1)
    up = beta16 * w
    dg = jnp.where(token & ~start, _sum_later(dg_row, boundary, start), 0) * unscale
    draw = dg * slope
    norm_vjp = lambda y, rstd, dy: rstd * (dy - y * jnp.sum(y * dy, -1, keepdims=True)) if normalize_qk else dy
    dq, dk = norm_vjp(qn, q_rstd, dq), norm_vjp(kn, k_rstd, up + down)
    dq, dk = (jnp.where(token, x * unscale, 0) for x in (dq, dk))
    dv = beta[..., None] * p * unscale
    sums = (None, None)
    if gate is not None:
        sums = jnp.sum(_rate_gradient(gate, raw, g, dg, draw), (2, 3, 4)), jnp.sum(draw, (2, 3))
    return dq, dk, dv, draw, dbeta * unscale[..., 0], *sums


def backward(
    q, k, g, beta, code, gate: Gate, prepared, h, r, applied, do, dfinal, size, *, scale, normalize_qk, leave=None
) -> Gradients:
    """See `chunk_mosaic_gpu_vjp.backward`."""
    B, T, H, K = q.shape
    HV = g.shape[2]
    code = jnp.zeros((B, T // C, C), jnp.int32) if code is None else code
    do_scale = jnp.where(code[:, None] == PADDING, 0.0, size[:, :, None, None]).reshape(beta.shape)
    of_state = size[:, :, None, None]
    last = (dfinal * of_state).reshape(B * HV, -1, K)
    ds, p, dinitial = recur_back(prepared, beta, do_scale, do, last, applied, run=reverse_chain, leave=leave)
    dinitial = dinitial.reshape(dfinal.shape) / of_state
    by_chunk, by_row = partial(_by_chunk, heads=HV), lambda x: x.reshape(B, HV, *x.shape[1:])
    beta, h, r, ds, p, cotangent, *prepared = map(by_row, (beta, h, r, ds, p, _scaled(do, do_scale), *prepared))

    def by_token(x):
        return jnp.moveaxis(x.reshape(B, HV, T, *x.shape[4:]), 1, 2)

    code = code[:, None]
    if gate is not None:
        gate = dataclasses.replace(gate, dt_bias=gate.dt_bias.astype(f32))
    dq, dk, dv, dg, dbeta, da_log, ddt_bias = chunk_gradients(
        *(by_chunk(q), by_chunk(k), by_chunk(g), beta, code, prepared[3], prepared[5], h, r, ds, p, cotangent),
        *(1 / size[:, :, None, None, None], gate),
        **dict(scale=scale, normalize_qk=normalize_qk),
    )
    of_head = lambda x: by_token(x).reshape(B, T, H, HV // H, K).sum(3).astype(q.dtype)
    if getattr(gate, "a_log", None) is None:
        da_log = None
    return Gradients(
        *(of_head(dq), of_head(dk), by_token(dv).astype(do.dtype), by_token(dg).astype(g.dtype)),
        *(dbeta.reshape(B * HV, T // C, C), da_log, ddt_bias, dinitial),
    )


def _by_chunk(x, heads: int):
    """[B, T, H, ...] to [B, heads, N, C, ...], each head repeated for those that share it."""
    B, T, H = x.shape[:3]
    x = jnp.repeat(jnp.moveaxis(x, 2, 1), heads // H, axis=1)
    return x.reshape(B, heads, T // C, C, *x.shape[3:])
