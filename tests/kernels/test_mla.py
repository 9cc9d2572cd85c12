"""Multi-head latent attention against a loop in float64: both forms, blocks of queries, masks, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla import xla
from pallas_kernels.mla.api import mla_absorbed_attention, mla_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, H, N, P, V, R = 2, 21, 2, 6, 4, 5, 7
# Largest difference over the largest magnitude of the float64 result.
TOLERANCE = {"o": 2e-6, "gradient": 2e-6}  # measured 2.4e-7 and 1.7e-7


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def arrays(S=T):
    return draw((B, T, H, N), (B, T, H, P), (B, S, H, N), (B, S, P), (B, S, H, V))


def loop(q_nope, q_shared, k_nope, k_shared, v, ids, key_ids, offset, scale):
    q_nope, q_shared, k_nope, k_shared, v = (np.asarray(a, np.float64) for a in (q_nope, q_shared, k_nope, k_shared, v))
    o, peak = np.zeros((B, T, H, V)), np.full(H, -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(k_nope.shape[1]) if s <= t + offset and ids[b, t] and key_ids[b, s] == ids[b, t]]
        if seen:
            logits = scale * (k_nope[b, seen, h] @ q_nope[b, t, h] + k_shared[b, seen] @ q_shared[b, t, h])
            p = np.exp(logits - logits.max())
            o[b, t, h] = p @ v[b, seen, h] / p.sum()
            peak[h] = max(peak[h], logits.max())
    return o, peak


def relative(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))


IDS = np.asarray([[1] * 9 + [2] * 12, [0] * 3 + [1] * 10 + [0] * 2 + [4] * 6])


@pytest.mark.parametrize("block", [512, 8])
def test_packed_documents(block, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_T", block)
    inputs, ids = arrays(), jnp.asarray(IDS, jnp.int32)
    o, peak = jax.jit(functools.partial(mla_attention, segment_ids=ids))(*inputs)
    want, want_peak = loop(*inputs, IDS, IDS, 0, (N + P) ** -0.5)
    assert relative(o, want) <= TOLERANCE["o"]
    np.testing.assert_allclose(peak, want_peak, rtol=1e-6)
    np.testing.assert_array_equal(o[np.asarray(IDS) == 0], 0)


def test_blocks_of_queries_without_a_shared_key(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_T", 8)
    q, _, k, _, v = arrays()
    inputs, ids = (q, jnp.zeros((B, T, H, 0)), k, jnp.zeros((B, T, 0)), v), np.ones((B, T), int)
    want, _ = loop(*inputs, ids, ids, 0, N**-0.5)
    assert relative(jax.jit(mla_attention)(*inputs)[0], want) <= TOLERANCE["o"]


@pytest.mark.parametrize("block", [512, 8])
def test_queries_at_the_end_of_longer_keys(block, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_T", block)
    S, offset = 40, 12
    inputs, ids, key_ids = arrays(S), np.ones((B, T), int), np.ones((B, S), int)
    key_ids[0, :5] = 0
    run = functools.partial(mla_attention, scale=0.7, query_offset=offset)
    o, peak = run(*inputs, segment_ids=jnp.asarray(ids, jnp.int32), key_segment_ids=jnp.asarray(key_ids, jnp.int32))
    want, want_peak = loop(*inputs, ids, key_ids, offset, 0.7)
    assert relative(o, want) <= TOLERANCE["o"]
    np.testing.assert_allclose(peak, want_peak, rtol=1e-6)


def test_blocks_leave_the_gradients_alone(monkeypatch):
    """The blocked form recomputes its scores; both are compared with a plain softmax that keeps everything."""
    inputs, (dy,) = arrays(), draw((B, T, H, V), seed=1)
    ids = jnp.asarray(IDS, jnp.int32)

    def plain(q_nope, q_shared, k_nope, k_shared, v):
        logits = jnp.einsum("BTHN,BSHN->BHTS", q_nope, k_nope) + jnp.einsum("BTHP,BSP->BHTS", q_shared, k_shared)
        seen = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None] & jnp.tri(T, dtype=bool)[None]
        p = jax.nn.softmax(jnp.where(seen[:, None], logits * (N + P) ** -0.5, -1e30), axis=-1)
        return jnp.einsum("BHTS,BSHV->BTHV", jnp.where(seen[:, None], p, 0), v)

    def blocked(*a):
        return mla_attention(*a, segment_ids=ids)[0]

    want = jax.jit(lambda dy, *a: jax.vjp(plain, *a)[1](dy))(dy, *inputs)
    for block in (512, 8):
        monkeypatch.setattr(xla, "BLOCK_T", block)
        got = jax.jit(lambda dy, *a: jax.vjp(blocked, *a)[1](dy))(dy, *inputs)
        for name, a, b in zip(("q_nope", "q_shared", "k_nope", "k_shared", "v"), got, want, strict=True):
            assert relative(a, np.asarray(b, np.float64)) <= TOLERANCE["gradient"], name


def test_absorbed_equals_expanded():
    q_nope, q_shared, latent, k_shared, up = draw((B, T, H, N), (B, T, H, P), (B, T, R), (B, T, P), (R, H, N + V))
    ids, up_key, up_value = jnp.asarray(IDS, jnp.int32), up[..., :N], up[..., N:]
    k_nope, v = (jnp.einsum("BSR,RHK->BSHK", latent, w) for w in (up_key, up_value))
    want, want_peak = mla_attention(q_nope, q_shared, k_nope, k_shared, v, segment_ids=ids)
    q_latent = jnp.einsum("BTHN,RHN->BTHR", q_nope, up_key)
    scale = (N + P) ** -0.5
    context, peak = mla_absorbed_attention(q_latent, q_shared, latent, k_shared, scale=scale, segment_ids=ids)
    assert relative(jnp.einsum("BTHR,RHV->BTHV", context, up_value), np.asarray(want, np.float64)) <= TOLERANCE["o"]
    np.testing.assert_allclose(peak, want_peak, rtol=1e-5)


def test_absorbed_runs_in_bfloat16_on_every_backend():
    """Several rows, one query each: a product that XLA's CPU backend refuses in some orders of axes."""
    inputs = draw((B, 1, H, R), (B, 1, H, P), (B, T, R), (B, T, P))
    attend = jax.jit(functools.partial(mla_absorbed_attention, scale=0.3, query_offset=T - 1))
    o, _ = attend(*(x.astype(jnp.bfloat16) for x in inputs))
    want, _ = attend(*inputs)
    assert relative(o, np.asarray(want, np.float64)) <= 1.5e-2  # measured 5.2e-3; bfloat16 keeps 8 bits


def test_wrong_arguments_are_named():
    q_nope, q_shared, k_nope, k_shared, v = arrays()
    with pytest.raises(ValueError, match=r"k_shared has shape \(2, 20, 4\), must be \(2, 21, 4\)"):
        mla_attention(q_nope, q_shared, k_nope, k_shared[:, 1:], v)
    with pytest.raises(ValueError, match=r"q_nope has shape .*, must be \(B, T, H, N\)"):
        mla_attention(q_nope[0], q_shared, k_nope, k_shared, v)
    with pytest.raises(ValueError, match="v is bfloat16: must be of one dtype"):
        mla_attention(q_nope, q_shared, k_nope, k_shared, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="segment_ids is float32, must be integer"):
        mla_attention(q_nope, q_shared, k_nope, k_shared, v, segment_ids=jnp.asarray(IDS, jnp.float32))
    with pytest.raises(ValueError, match="give both segment_ids and key_segment_ids"):
        mla_attention(*arrays(S=30), segment_ids=jnp.asarray(IDS, jnp.int32))
