"""The backward kernels of KDA in plain JAX with the same rounding points: what `chunk_mosaic_gpu_vjp` must compute."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.kda.gates import Gate, LowerBoundGate, SoftplusGate
from pallas_kernels.kda.prepare_mosaic_gpu import FINE, FORGET, LEVELS, LOG2E, PADDING, RESET, C
from pallas_kernels.kda.reference import L2_EPS

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


def cotangent_scale(
    do: Float[Array, "B T HV V"], dfinal: Float[Array, "B HV V K"], padding: Int[Array, "B T"] | None
) -> Float[Array, "B HV"]:
    """The power of two per row and head that brings the largest cotangent into [0.5, 1), so that float16 holds them."""
    size = jnp.abs(do.astype(f32))
    if padding is not None:
        size = jnp.where(padding[..., None, None], 0.0, size)
    final = jnp.abs(lax.optimization_barrier(dfinal))  # mostly zeros that XLA would fold for seconds
    largest = jnp.maximum(jnp.max(size, axis=(1, 3)), jnp.max(final, axis=(2, 3)))
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(-exponent, -100, 100))


def reverse(kg, kr, qg, t, aqk, gamma, beta, do, dfinal):
    """The chain from the last chunk to the first: gradients of the states.

    Args:
      kg, kr, qg [B,HV,NT,C,K], t, aqk [B,HV,NT,C,C]: float16, from the preparation; gamma [B,HV,NT,K], beta
        [B,HV,NT,C]: float32.
      do: scaled cotangent of o, zero at padding, [B,HV,NT,C,V] float16; dfinal: scaled, [B,HV,V,K] float32.

    Returns:
      ds: gradient of the state leaving each chunk, [B,HV,NT,V,K] float16; p: T^T dVn, [B,HV,NT,C,V] float16;
      gradient of the initial state, [B,HV,V,K] float32; all in the scale of the cotangents.
    """

    def chunk(ds, x):
        kg, kr, qg, t, aqk, gamma, beta, do = (y.astype(f32) for y in x)
        ds16 = _round(ds)
        dvn = _einsum("bhiv,bhij->bhvj", do, aqk) + _einsum("bhvk,bhjk->bhvj", ds16, kr)
        p = _einsum("bhvi,bhij->bhvj", _round(dvn), t)
        dv = _round(-p * beta[:, :, None, :])
        before = ds * gamma[:, :, None, :] + _einsum("bhiv,bhik->bhvk", do, qg) + _einsum("bhvj,bhjk->bhvk", dv, kg)
        return before, (ds16.astype(f16), p.astype(f16))

    xs = tuple(jnp.moveaxis(x, 2, 0) for x in (kg, kr, qg, t, aqk, gamma, beta, do))
    dinitial, (ds, p) = lax.scan(chunk, dfinal, xs, reverse=True)
    return jnp.moveaxis(ds, 0, 2), jnp.swapaxes(jnp.moveaxis(p, 0, 2), -1, -2), dinitial


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


def chunk_gradients(q, k, raw, beta, code, t, gamma, h, r, ds, p, do, unscale, gate: Gate, *, scale, normalize_qk):
    """Gradients of every input inside its chunk.

    Args:
      q, k, raw: inputs by chunk, [B,HV,NT,C,K]; beta [B,HV,NT,C]; code [B,1,NT,C]: 0 token, 1 start, 2 padding.
      t, gamma: from the preparation; h, r: state entering the chunk and V - Kg S, from the forward recurrence.
      ds, p, do: as in `reverse`; unscale: reciprocal of the cotangents' scale, [B,HV,1,1,1].

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
    high = _round(dg_row, bf16)
    low = _round(dg_row - high, bf16)
    suffix = partial(_einsum, "ti,...id->...td", (row <= col).astype(np.float32))
    dg = jnp.where(token & ~start, suffix(high) + suffix(low) + boundary[..., None, :], 0) * unscale
    draw = dg * slope
    norm_vjp = lambda y, rstd, dy: rstd * (dy - y * jnp.sum(y * dy, -1, keepdims=True)) if normalize_qk else dy
    dq, dk = norm_vjp(qn, q_rstd, dq), norm_vjp(kn, k_rstd, up + down)
    dq, dk = (jnp.where(token, x * unscale, 0) for x in (dq, dk))
    dv = beta[..., None] * p * unscale
    sums = (None, None)
    if gate is not None:
        sums = jnp.sum(_rate_gradient(gate, raw, g, dg, draw), (2, 3, 4)), jnp.sum(draw, (2, 3))
    return dq, dk, dv, draw, dbeta * unscale[..., 0], *sums


def backward(q, k, g, beta, code, gate: Gate, prepared, h, r, do, dfinal, *, scale, normalize_qk) -> Gradients:
    """See `chunk_mosaic_gpu_vjp.backward`."""
    B, T, H, K = q.shape
    HV = g.shape[2]
    code = jnp.zeros((B, T // C, C), jnp.int32) if code is None else code
    size, cotangent, ds, p, dinitial = _chain(beta, code, prepared, do, dfinal)
    by_chunk = partial(_by_chunk, heads=HV)
    beta, h, r, *prepared = (x.reshape(B, HV, *x.shape[1:]) for x in (beta, h, r, *prepared))

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


def entering_gradient(beta, code, prepared, do, dfinal):
    """See `chunk_mosaic_gpu_vjp.entering_gradient`."""
    B, T = do.shape[:2]
    code = jnp.zeros((B, T // C, C), jnp.int32) if code is None else code
    return _chain(beta, code, prepared, do, dfinal)[-1]


def _chain(beta, code, prepared, do, dfinal):
    """(scale, scaled cotangent by chunk, ds and p of `reverse`, gradient of the initial state)."""
    B, T, HV = do.shape[:3]
    size = cotangent_scale(do, dfinal, (code == PADDING).reshape(B, T))
    beta, *prepared = (x.reshape(B, HV, *x.shape[1:]) for x in (beta, *prepared))
    cotangent = _by_chunk(do, HV).astype(f32) * size[:, :, None, None, None]
    cotangent = jnp.where((code[:, None] != PADDING)[..., None], cotangent, 0).astype(f16)
    ds, p, dinitial = reverse(*prepared, beta, cotangent, dfinal * size[:, :, None, None])
    return size, cotangent, ds, p, dinitial / size[:, :, None, None]


def _by_chunk(x, heads: int):
    """[B, T, H, ...] to [B, heads, N, C, ...], each head repeated for those that share it."""
    B, T, H = x.shape[:3]
    x = jnp.repeat(jnp.moveaxis(x, 2, 1), heads // H, axis=1)
    return x.reshape(B, heads, T // C, C, *x.shape[3:])
