"""The chunked cross-entropy against the dense one: values, gradients, and that the logits never exist at once."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.train.loss import cross_entropy

B, T, D, A = 2, 37, 16, 101
CHUNKS = [1, 24, 1024]  # tokens: less than one column, T no multiple of 12 columns, more than all

# Largest error over the RMS of the float64 result: (bound, measured). In bfloat16 the logits' gradient has 8 bits.
TOLERANCE = {
    "float32": {"loss": (1e-6, 1.8e-7), "lse": (1e-6, 2.0e-7), "d_hidden": (8e-6, 2.1e-6), "d_weight": (8e-6, 3.7e-6)},
    "bfloat16": {"loss": (1e-6, 1.2e-7), "lse": (1e-6, 1.1e-7), "d_hidden": (4e-2, 1.9e-2), "d_weight": (4e-2, 2.3e-2)},
}


def _inputs(dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(D, A)), dtype).astype(jnp.float32)  # the same numbers in every dtype
    targets = jnp.asarray(rng.integers(0, A, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.random((B, T)) < 0.8)
    cotangents = jnp.asarray(rng.normal(size=(2, B, T)), jnp.float32)
    return hidden, weight, targets, mask, cotangents


def _dense(hidden, weight, targets, mask):
    logits = jnp.einsum("BTD,DA->BTA", hidden, weight)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, lse - target, 0.0), jnp.where(mask, lse, 0.0)


def _values_and_gradients(function, hidden, weight, targets, mask, cotangents):
    out, vjp = jax.vjp(lambda h, w: function(h, w, targets, mask), hidden, weight)
    return dict(zip(("loss", "lse", "d_hidden", "d_weight"), (*out, *vjp(tuple(cotangents))), strict=True))


@functools.cache
def _definition(dtype):
    hidden, weight, targets, mask, cotangents = _inputs(dtype)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, weight)]
        result = _values_and_gradients(_dense, *wide, targets, mask, jnp.asarray(cotangents, jnp.float64))
        return {name: np.asarray(x) for name, x in result.items()}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_dense(dtype, chunk):
    chunked = functools.partial(_values_and_gradients, lambda *args: cross_entropy(*args, chunk))
    got = jax.jit(chunked)(*_inputs(dtype))
    assert got["d_hidden"].dtype == dtype
    assert got["loss"].dtype == got["lse"].dtype == got["d_weight"].dtype == jnp.float32
    for name, want in _definition(dtype).items():
        error = np.abs(np.asarray(got[name], np.float64) - want).max() / np.sqrt(np.mean(want**2))
        assert error <= TOLERANCE[dtype][name][0], f"{name}: {error:.2e}"


def test_masked_tokens_give_nothing_whatever_they_hold():
    hidden, weight, targets, mask, cotangents = _inputs("float32")
    loud = jnp.where(mask[..., None], hidden, 1e4)  # logits whose exponential overflows
    wild = jnp.where(mask, targets, -1)
    quiet = jnp.where(mask[..., None], hidden, 0.0)
    chunked = lambda *args: cross_entropy(*args, 16)
    got = _values_and_gradients(chunked, loud, weight, wild, mask, cotangents)
    want = _values_and_gradients(chunked, quiet, weight, targets, mask, cotangents)
    assert np.all(np.asarray(got["d_hidden"])[~np.asarray(mask)] == 0)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-6, err_msg=name)


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def test_logits_never_exist_at_once():
    chunk, vocab, length = 64, 1031, 256
    hidden, weight = jax.ShapeDtypeStruct((B, length, D), jnp.bfloat16), jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    targets, mask = (jax.ShapeDtypeStruct((B, length), dtype) for dtype in (jnp.int32, jnp.bool_))

    def total(loss, h, w, t, m):
        return sum(x.sum() for x in loss(h, w, t, m))

    def peak(loss):
        gradient = jax.grad(functools.partial(total, loss), argnums=(0, 1))
        compiled = jax.jit(gradient).lower(hidden, weight, targets, mask).compile()
        jaxpr = jax.make_jaxpr(gradient)(hidden, weight, targets, mask)
        return max(_sizes(jaxpr.jaxpr)), compiled.memory_analysis().temp_size_in_bytes

    largest, temporary = peak(lambda *args: cross_entropy(*args, chunk))
    dense_largest, dense_temporary = peak(_dense)
    assert largest == chunk * vocab, "the largest intermediate is one chunk of logits"
    assert dense_largest == B * length * vocab, "the dense form is what the count should catch"
    assert temporary < dense_temporary / 4
