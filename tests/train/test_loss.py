"""The chunked cross-entropy against the dense one: values, gradients, and that the logits never exist at once."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.train.loss import (
    CHUNK_BYTES,
    CHUNK_TOKENS,
    LOGIT_BYTES,
    choose_chunk,
    mean_cross_entropy,
    token_cross_entropy,
)

B, T, D, A = 2, 37, 16, 101
CHUNKS = [1, 24, None]  # tokens: less than one column, T no multiple of 12 columns, all at once
Z_WEIGHT, SLOPE = 0.1, 0.7  # the second: cotangent of the result

# Largest error over the RMS of the float64 result: (bound, measured). In bfloat16 the logits' gradient has 8 bits.
TOLERANCE = {
    "float32": {"loss": (1e-6, 1.8e-7), "lse": (1e-6, 2.0e-7), "d_hidden": (8e-6, 2.1e-6), "d_weight": (8e-6, 5.3e-6)},
    "bfloat16": {"loss": (1e-6, 1.2e-7), "lse": (1e-6, 1.1e-7), "d_hidden": (3e-2, 1.4e-2), "d_weight": (2e-2, 9.1e-3)},
}


def _inputs(dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(D, A)), dtype).astype(jnp.float32)  # the same numbers in every dtype
    targets = jnp.asarray(rng.integers(0, A, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.random((B, T)) < 0.8)
    return hidden, weight, targets, mask


def _dense_tokens(hidden, weight, targets, mask):
    logits = jnp.einsum("BTD,DA->BTA", hidden, weight)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, lse - target, 0.0), jnp.where(mask, lse, 0.0)


def _dense(hidden, weight, targets, mask):
    loss, lse = _dense_tokens(hidden, weight, targets, mask)
    losses = jnp.sum(loss) / mask.sum(), jnp.sum(jnp.square(lse)) / mask.sum()
    return losses[0] + Z_WEIGHT * losses[1], losses


def _chunked(hidden, weight, targets, mask, chunk):
    return mean_cross_entropy(hidden, weight, targets, mask, jnp.sum(mask).astype(jnp.float32), Z_WEIGHT, chunk)


def _everything(function, tokens, hidden, weight, targets, mask):
    (total, (loss, z_loss)), vjp = jax.vjp(lambda h, w: function(h, w, targets, mask), hidden, weight)
    zero = jnp.zeros((), total.dtype)
    gradients = vjp((zero + SLOPE, jax.tree.map(jnp.zeros_like, function(hidden, weight, targets, mask)[1])))
    per_token = tokens(hidden, weight, targets, mask)[:2]
    names = ("total", "mean", "z_loss", "d_hidden", "d_weight", "loss", "lse")
    return dict(zip(names, (total, loss, z_loss, *gradients, *per_token), strict=True))


@functools.cache
def _definition(dtype):
    hidden, weight, targets, mask = _inputs(dtype)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, weight)]
        result = _everything(_dense, _dense_tokens, *wide, targets, mask)
        return {name: np.asarray(x) for name, x in result.items()}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_dense(dtype, chunk):
    functions = (functools.partial(f, chunk=chunk) for f in (_chunked, token_cross_entropy))
    got = jax.jit(functools.partial(_everything, *functions))(*_inputs(dtype))
    assert got["d_hidden"].dtype == dtype
    assert {x.dtype for name, x in got.items() if name != "d_hidden"} == {jnp.dtype(jnp.float32)}
    tolerance = TOLERANCE[dtype] | dict.fromkeys(("total", "mean", "z_loss"), TOLERANCE[dtype]["loss"])
    for name, want in _definition(dtype).items():
        error = np.abs(np.asarray(got[name], np.float64) - want).max() / np.sqrt(np.mean(want**2))
        print(f"{dtype} {chunk} {name} {error:.1e}")
        assert error <= tolerance[name][0], f"{name}: {error:.2e}"


def test_the_value_alone_equals_the_value_with_its_gradient():
    inputs = _inputs("float32")
    alone = _chunked(*inputs, 24)
    both = jax.value_and_grad(_chunked, has_aux=True)(*inputs, 24)[0]
    for got, want in zip(jax.tree.leaves(alone), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_target_is_correct_where_no_logit_is_larger():
    hidden, weight, targets, mask = _inputs("float32")
    likeliest = jnp.argmax(jnp.einsum("BTD,DA->BTA", hidden, weight), axis=-1)
    right = jnp.arange(targets.size).reshape(targets.shape) % 3 == 0
    wrong = (likeliest + 1) % weight.shape[1]
    got = token_cross_entropy(hidden, weight, jnp.where(right, likeliest, wrong), mask, 16).correct
    np.testing.assert_array_equal(got, right & mask)
    assert 0 < got.sum() < mask.sum()


def test_masked_tokens_give_nothing_whatever_they_hold():
    hidden, weight, targets, mask = _inputs("float32")
    loud = jnp.where(mask[..., None], hidden, 1e4)  # logits whose exponential overflows
    wild = jnp.where(mask, targets, -1)
    quiet = jnp.where(mask[..., None], hidden, 0.0)
    functions = [functools.partial(f, chunk=16) for f in (_chunked, token_cross_entropy)]
    got = _everything(*functions, loud, weight, wild, mask)
    want = _everything(*functions, quiet, weight, targets, mask)
    assert np.all(np.asarray(got["d_hidden"])[~np.asarray(mask)] == 0)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_weight_in_bfloat16_has_a_gradient_in_bfloat16():
    hidden, weight, targets, mask = _inputs("bfloat16")
    gradient = jax.grad(lambda w: _chunked(hidden, w, targets, mask, 24)[0])
    narrow, wide = gradient(weight.astype(jnp.bfloat16)), gradient(weight)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16), "accumulated in float32, rounded once")


def test_the_default_chunk_is_bounded_in_tokens_and_in_bytes():
    assert choose_chunk(32768) == CHUNK_TOKENS
    assert choose_chunk(2**19) == CHUNK_BYTES // (LOGIT_BYTES * 2**19) < CHUNK_TOKENS
    assert choose_chunk(CHUNK_BYTES) == 1


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def test_logits_never_exist_at_once():
    chunk, vocab, length = 64, 1031, 256
    hidden, weight = jax.ShapeDtypeStruct((B, length, D), jnp.bfloat16), jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    targets, mask = (jax.ShapeDtypeStruct((B, length), dtype) for dtype in (jnp.int32, jnp.bool_))

    def peak(loss):
        gradient = jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1))
        compiled = jax.jit(gradient).lower(hidden, weight, targets, mask).compile()
        jaxpr = jax.make_jaxpr(gradient)(hidden, weight, targets, mask)
        return max(_sizes(jaxpr.jaxpr)), compiled.memory_analysis().temp_size_in_bytes

    largest, temporary = peak(functools.partial(_chunked, chunk=chunk))
    dense_largest, dense_temporary = peak(_dense)
    assert largest == chunk * vocab, "the largest intermediate is one chunk of logits"
    assert dense_largest == B * length * vocab, "the dense form is what the count should catch"
    assert temporary < dense_temporary / 4
