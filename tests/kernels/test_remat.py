"""What rematerialisation makes from kept values: which of three programs runs where, alone, mapped and in a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.remat import remake


@jax.custom_vjp
def operator(x):
    return _forward(x)[0]


def _forward(x):
    y, kept = jnp.sin(x), checkpoint_name(jnp.cos(x), "kept")
    return y, (kept, remake(jnp.tan(x), jnp.exp, kept))  # not equal, so that it shows which of them was taken


operator.defvjp(_forward, lambda saved, dy: (dy * saved[0] * saved[1],))
NAMED = jax.checkpoint_policies.save_only_these_names("kept")
RULES = {
    "none": (lambda f: f, jnp.tan),
    "everything": (jax.checkpoint, jnp.tan),  # where the sources are made again, so is the value
    "named": (lambda f: jax.checkpoint(f, policy=NAMED), lambda x: jnp.exp(jnp.cos(x))),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_backward_pass_takes_the_value_or_makes_it(rule):
    wrap, value = RULES[rule]
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    want = jnp.cos(x) * value(x)
    gradient = jax.grad(lambda x: wrap(lambda x: operator(x).sum())(x))
    scanned = jax.grad(
        lambda x: jax.lax.scan(lambda total, row: (total + wrap(operator)(row), None), x[0] * 0, x)[0].sum()
    )
    for got in (gradient(x), jax.jit(gradient)(x), jax.vmap(gradient)(x), jax.jit(jax.vmap(gradient))(x), scanned(x)):
        np.testing.assert_allclose(got, want, rtol=1e-6)  # measured 1.5e-7


def test_what_is_not_taken_does_not_run():
    named = jax.grad(lambda x: RULES["named"][0](lambda x: operator(x).sum())(x))
    text = jax.jit(named).lower(jnp.ones(3)).as_text()
    assert "exponential" in text and ".tan" not in text
