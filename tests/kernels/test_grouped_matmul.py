"""The grouped matrix product against a loop over groups: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Largest error over the largest magnitude of the float64 loop; measured 2.1e-7 (float32), 3.2e-3 (bfloat16).
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}
SIZES = {  # rows per group; the array has 150 rows
    "even": (30, 30, 30, 30, 30),
    "empty_groups": (0, 100, 0, 50, 0),
    "one_takes_all": (0, 0, 0, 0, 150),
    "rows_left_over": (64, 1, 0, 65, 3),
    "all_empty": (0, 0, 0, 0, 0),
}
M, D, F = 150, 12, 20


def loop(x, w, dy, sizes):
    """y, dx and dw in float64."""
    y, dx, dw = np.zeros((M, F)), np.zeros((M, D)), np.zeros(w.shape)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(x, w, dy, group_sizes, implementation):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=implementation), x, w)
    return y, *pull(dy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", SIZES)
def test_matches_a_loop_over_groups(case, dtype, implementation):
    rng = np.random.default_rng(0)
    shapes = ((M, D), (len(SIZES[case]), D, F), (M, F))
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    group_sizes = jnp.asarray(SIZES[case], jnp.int32)
    got = value_and_gradients(x, w, dy, group_sizes, implementation)
    want = loop(*(np.asarray(a, np.float64) for a in (x, w, dy)), SIZES[case])
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert a.dtype == dtype
        error = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(np.max(np.abs(b)), 1.0)
        assert error <= TOLERANCE[dtype], f"{name}: error {error:.2e}"


def test_wrong_arguments_are_named():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 5, 6))
    with pytest.raises(ValueError, match=r"x \(4, 3\), w \(2, 5, 6\)"):
        grouped_matmul(x, w, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="must be integers"):
        grouped_matmul(x, jnp.zeros((2, 3, 6)), jnp.zeros(2))
