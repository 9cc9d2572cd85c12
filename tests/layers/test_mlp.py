"""The elementwise part of the feed-forward block against automatic differentiation, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.layers.mlp import swiglu


def _plain(both):
    return jax.nn.silu(both[..., 0]) * both[..., 1]


def _inputs(dtype):
    keys = jax.random.split(jax.random.key(0))
    return [(4 * jax.random.normal(k, s)).astype(dtype) for k, s in zip(keys, [(3, 5, 16, 2), (3, 5, 16)], strict=True)]


def test_values_and_gradients_are_those_of_the_definition():
    both, dy = _inputs(jnp.float32)
    values = [jax.vjp(f, both) for f in (swiglu, _plain)]
    gradients = [pull(dy) for _, pull in values]
    for got, want in zip((values[0][0], *gradients[0]), (values[1][0], *gradients[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)  # measured 1.5e-7


def test_bfloat16_is_rounded_once_and_keeps_only_its_argument():
    both, dy = _inputs(jnp.bfloat16)
    y, pull = jax.vjp(swiglu, both)
    wide, wide_pull = jax.vjp(_plain, both.astype(jnp.float32))
    for got, want in zip((y, *pull(dy)), (wide, *wide_pull(dy.astype(jnp.float32))), strict=True):
        np.testing.assert_array_less(np.abs(got - want), 2**-8 * np.abs(want) + 1e-6)  # half a unit: 2**-9
    assert [x.dtype for x in jax.tree.leaves(pull)] == [jnp.bfloat16]
