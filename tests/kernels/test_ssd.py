"""Scalar-decay linear attention: the chunked form against the recurrence, values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd.api import IMPLEMENTATIONS, chunk_ssd

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Largest error over the largest magnitude of the reference; measured 4.3e-7 for both (bfloat16 inputs, float32 inside);
# bfloat16 results may differ by one rounding.
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3}
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
CASES = {  # B, T, H, HV, K, V, tile
    "one_token": (1, 1, 1, 1, 4, 4, None),
    "ragged": (2, 37, 2, 2, 8, 12, 16),
    "shared_keys": (1, 33, 2, 4, 8, 4, 8),
    "one_chunk": (2, 20, 1, 2, 4, 8, 64),
    "two_blocks": (1, 131, 1, 1, 4, 4, 2),  # 66 chunks
}


def make_inputs(B, T, H, HV, K, V, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    g = -jnp.abs(jnp.asarray(rng.standard_normal((B, T, HV)), jnp.float32))
    beta = jax.nn.sigmoid(jnp.asarray(rng.standard_normal((B, T, HV)), jnp.float32))
    state = jnp.asarray(rng.standard_normal((B, HV, V, K)), jnp.float32)
    return draw(B, T, H, K), draw(B, T, H, K), draw(B, T, HV, V), g, beta, state


@functools.partial(jax.jit, static_argnames=("implementation", "tile"))
def run(q, k, v, g, beta, state, segment_ids=None, *, implementation, tile=None):
    settings = {"initial_state": state, "segment_ids": segment_ids, "implementation": implementation, "tile": tile}
    return chunk_ssd(q, k, v, g, beta, **settings)


@functools.partial(jax.jit, static_argnames=("implementation", "tile"))
def run_both_ways(inputs, cotangents, segment_ids, *, implementation, tile):
    """((o, final state), gradients of the inputs)."""
    out, pull = jax.vjp(lambda *xs: run(*xs, segment_ids, implementation=implementation, tile=tile), *inputs)
    return out, pull(cotangents)


def assert_close(name, got, want, tolerance):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    error = np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30)
    assert error <= tolerance, f"{name}: error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("case, dtype", [*((case, "float32") for case in CASES), ("ragged", "bfloat16")])
def test_values_and_gradients_match_the_recurrence(case, dtype):
    *shape, tile = CASES[case]
    B, T, _, HV, K, V = shape
    inputs = make_inputs(*shape, dtype=dtype)
    segment_ids = jnp.asarray(np.resize([1, 1, 1, 0, 2, 2, 0, 0, 0, 5, 3, 3, 3, 3], (B, T)), jnp.int32)
    rng = np.random.default_rng(1)
    cotangents = tuple(
        jnp.asarray(rng.standard_normal(s), d) for s, d in (((B, T, HV, V), dtype), ((B, HV, V, K), "f4"))
    )
    results = [
        run_both_ways(inputs, cotangents, segment_ids, implementation=name, tile=tile)
        for name in ("chunked", "reference")
    ]
    for name, got, want in zip(("o", "final_state"), *(out for out, _ in results), strict=True):
        assert_close(name, got, want, TOLERANCE[dtype])
    for name, got, want in zip(NAMES, *(grads for _, grads in results), strict=True):
        assert_close(f"d{name}", got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reference_by_hand(implementation):
    """Two tokens, one channel: S_1 = b_1 k_1 v_1 + a_1 S_0, S_2 = a_2 S_1 + b_2 k_2 v_2."""
    q, k, v = (jnp.asarray(x, jnp.float32).reshape(1, 2, 1, 1) for x in ([1.0, 2.0], [3.0, 5.0], [7.0, 11.0]))
    g, beta = (jnp.asarray(x, jnp.float32).reshape(1, 2, 1) for x in ([np.log(0.5), np.log(0.25)], [0.5, 1.0]))
    o, state = run(q, k, v, g, beta, jnp.full((1, 1, 1, 1), 4.0), implementation=implementation)
    first = 0.5 * 4.0 + 0.5 * 3.0 * 7.0
    second = 0.25 * first + 5.0 * 11.0
    np.testing.assert_allclose(np.ravel(o), [first, 2 * second], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(state), [second], rtol=1e-6)


@pytest.mark.parametrize("strength", [-1000.0, -30.0])
def test_forgetting_stays_exact_after_it(strength):
    """One strong decay must not disturb the decays around it: differences of cumulative sums would."""
    q, k, v, g, beta, state = make_inputs(1, 24, 1, 1, 4, 4)
    g = g.at[:, 9].set(strength)
    got = run(q, k, v, g, beta, state, implementation="chunked", tile=16)
    want = run(q, k, v, g, beta, state, implementation="reference")
    for name, a, b in zip(("o", "final_state"), got, want, strict=True):
        assert_close(name, a, b, TOLERANCE["float32"])


def test_padding_may_hold_anything():
    q, k, v, g, beta, state = make_inputs(1, 12, 1, 1, 4, 4)
    segment_ids = jnp.asarray([[0, 0, 1, 1, 0, 1, 1, 2, 2, 0, 0, 0]], jnp.int32)
    bad = [jnp.where((segment_ids == 0).reshape(1, 12, *(1,) * (x.ndim - 2)), jnp.nan, x) for x in (q, k, v, g, beta)]
    settings = {"implementation": "chunked", "tile": 8}
    cotangents = (jnp.ones_like(v), jnp.ones_like(state))
    want = run_both_ways((q, k, v, g, beta, state), cotangents, segment_ids, **settings)
    got = run_both_ways((*bad, state), cotangents, segment_ids, **settings)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "argument, shape, message",
    [("k", (1, 4, 2, 8), "k has shape"), ("beta", (1, 5, 2), "beta has shape"), ("v", (1, 4, 3, 4), "g has shape")],
)
def test_wrong_shapes_are_named(argument, shape, message):
    arrays = dict(zip(NAMES[:5], make_inputs(1, 4, 2, 2, 4, 4)[:5], strict=True))
    arrays[argument] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        chunk_ssd(*arrays.values())
