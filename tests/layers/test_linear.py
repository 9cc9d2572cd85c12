"""The product with a weight: same values as einsum, weight gradients summed and kept in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.layers.linear import fan_out, project, project_narrow

SHAPES = {
    "BTD,DHK->BTHK": ((2, 9, 6), (6, 3, 4)),
    "BTHV,HVD->BTD": ((2, 9, 3, 4), (3, 4, 6)),
    "BSR,RHK->BSHK": ((2, 9, 5), (5, 3, 4)),
    "BTD,DF->BTF": ((2, 9, 6), (6, 7)),
}
# Largest difference over the largest magnitude against float64; one rounding of bfloat16 is 3.9e-3.
TOLERANCE = {"float32": {"y": 1e-6, "dx": 1e-6, "dw": 1e-6}, "bfloat16": {"y": 4e-3, "dx": 4e-3, "dw": 1e-6}}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spec", SHAPES)
def test_values_and_gradients(spec, dtype):
    rng = np.random.default_rng(0)
    x_shape, w_shape = SHAPES[spec]
    exact = jnp.bfloat16  # values that both dtypes hold exactly
    x, w = jnp.asarray(rng.standard_normal(x_shape), exact).astype(dtype), rng.standard_normal(w_shape)
    w = jnp.asarray(w, exact).astype(jnp.float32)
    y, pull = jax.vjp(lambda x, w: project(spec, x, w), x, w)
    dy = jnp.asarray(rng.standard_normal(y.shape), exact).astype(dtype)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.dtype(dtype), jnp.dtype(dtype), jnp.float32)
    terms, out = spec.split("->")
    first, second = terms.split(",")
    a, b, c = (np.asarray(array, np.float64) for array in (x, w, dy))
    want = {
        "y": np.einsum(spec, a, b),
        "dx": np.einsum(f"{out},{second}->{first}", c, b),
        "dw": np.einsum(f"{first},{out}->{second}", a, c),
    }
    for name, got in (("y", y), ("dx", dx), ("dw", dw)):
        error = np.max(np.abs(np.asarray(got, np.float64) - want[name])) / np.max(np.abs(want[name]))
        assert error <= TOLERANCE[dtype][name], f"{name}: error {error:.1e}"


def test_gradients_of_models_together_are_those_of_each():
    spec, rng = "BTHV,HVD->BTD", np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32) for shape in SHAPES[spec])

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.sin(project(spec, x, w))))(w)

    for over, inputs in ((0, x), (None, x[0])):  # each has its own inputs, or all the same
        together = jax.vmap(gradient, in_axes=(over, 0))(inputs, w)
        apart = jnp.stack([gradient(inputs if over is None else inputs[i], w[i]) for i in range(3)])
        error = float(jnp.max(jnp.abs(together - apart)) / jnp.max(jnp.abs(apart)))
        assert error <= 1e-6, f"error {error:.1e}"  # measured 2.8e-7


def test_narrow_products_are_those_of_each_matrix():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 8)), jnp.float32)  # more tokens than columns
    weights = [jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for n in (4, 1, 3)]

    def together(x, *weights):
        for_one, for_other = fan_out(x, 2)
        return sum(jnp.sum(jnp.sin(y)) for y in project_narrow(for_one, weights)) + jnp.sum(for_other**2)

    def each(x, *weights):
        return sum(jnp.sum(jnp.sin(jnp.einsum("BTD,DR->BTR", x, w))) for w in weights) + jnp.sum(x**2)

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(x, *weights) for f in (together, each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)  # measured 9.5e-7
