"""Weights travel rounded, their gradients do not, and those of a block before the next block's are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import mesh as config
from kimi_jax.parallel.mesh import abstract_mesh, build_mesh
from kimi_jax.parallel.weights import gather_rounded, in_turn


def _two_blocks(x, first, second):
    x, second = in_turn(x, second)
    return jnp.sum(jnp.tanh(jnp.tanh(x @ first) @ second) ** 2)


def test_the_gradient_of_a_block_waits_for_those_of_the_weights_behind_it():
    arrays = [jax.random.normal(jax.random.key(i), (4, 4)) for i in range(3)]
    gradients = jax.grad(_two_blocks, argnums=(0, 1, 2))
    with jax.sharding.use_abstract_mesh(abstract_mesh(config.Mesh(fsdp=2), 2)):
        jaxpr = jax.make_jaxpr(gradients)(*arrays).jaxpr
    (waiting,) = (e for e in jaxpr.eqns if str(e.primitive) == "optimization_barrier")
    dx, d_first, d_second = jaxpr.outvars
    assert waiting.outvars == [dx, d_second]
    assert d_first not in waiting.outvars


def test_one_device_waits_for_nothing():
    x = jnp.ones((4, 4))
    assert "optimization_barrier" not in str(jax.make_jaxpr(jax.grad(_two_blocks))(x, x, x))


@pytest.mark.multi_device
def test_rounded_weights_have_unrounded_gradients():
    """Each device multiplies the whole weight by a number of its own; the sums of these are no bfloat16."""
    w = jax.random.normal(jax.random.key(0), (16, 3))
    factors = 1 + jnp.arange(8, dtype=jnp.float32) / 1000

    def loss(w, factor):
        return jax.lax.psum(jnp.sum(factor[:, None] * gather_rounded(w, ("fsdp",), 0, jnp.bfloat16)), ("fsdp",))

    with jax.set_mesh(build_mesh(config.Mesh(fsdp=8))):
        specs = (jax.P("fsdp"), jax.P("fsdp"))
        total = jax.shard_map(loss, in_specs=specs, out_specs=jax.P(), check_vma=False)
        value, gradient = jax.jit(jax.value_and_grad(total))(w, factors)
    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(value, factors.sum() * rounded.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.full_like(w, factors.sum()), rtol=1e-6)
