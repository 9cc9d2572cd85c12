"""Logits with their log-sum-exp against float32 products, and that the two belong to each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.logits import api, mosaic_gpu
from pallas_kernels.logits.xla import log_sum_exp_in_one_pass
from pallas_kernels.partition import refuse_cut_matrices

# rows, width, vocabulary, scale of the weight: whole tiles; rows left over, tiles of 192, columns left over
GPU_SHAPES = [
    (512, 1024, 32768, 0.03),
    (1000, 1216, 4096, 0.2),
    (5, 64, 384, 3.0),
    (129, 512, 264, 0.5),
    (16, 64, 101, 1.0),
]
ROUNDING = 2.0**-11  # of float16, relative to the value
LSE_TOLERANCE = 4e-6  # relative to 1 + the log-sum-exp itself; in the order of float32 sums


def _draw(rows, width, vocab, scale):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, width)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(width, vocab)) * scale, jnp.bfloat16)
    return x, weight, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def _check(arguments, implementation):
    x, weight, targets = arguments
    got = jax.jit(functools.partial(api.logits, implementation=implementation))(*arguments)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    values, lse = np.asarray(got.values, np.float64), np.asarray(got.log_sum_exp, np.float64)
    width = ROUNDING * np.abs(want) + 1e-5 * np.abs(want).max()  # the second: float32 sums
    assert np.all(np.abs(values - want) <= width)
    consistent = np.log(np.exp(values - values.max(1, keepdims=True)).sum(1)) + values.max(1)
    error = np.abs(lse - consistent) / (1 + np.abs(consistent))
    print(f"{values.shape}: log-sum-exp off by {error.max():.1e}")
    assert error.max() < LSE_TOLERANCE
    np.testing.assert_array_equal(got.target, values[np.arange(len(values)), targets])
    return got


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_plain_logits(dtype):
    x, weight, targets = _draw(37, 24, 101, 1.0)
    got = _check((x.astype(dtype), weight.astype(dtype), targets), "xla")
    assert got.values.dtype == jnp.float32


def test_one_pass_over_the_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1031)) * 30, jnp.float32)
    logits = logits.at[0, 0].set(-1e20).at[0, 1, 5].set(3e4)
    want = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(jax.jit(log_sum_exp_in_one_pass)(logits), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "word"),
    [((8, 64), jnp.float32, "bfloat16 or float16"), ((8, 72), jnp.bfloat16, "multiples of 64")],
)
def test_what_the_kernel_refuses(shape, dtype, word):
    assert word in mosaic_gpu.unserved(jnp.zeros(shape, dtype))


def test_a_head_cut_over_devices_is_left_to_xla():
    mesh = jax.sharding.AbstractMesh((2, 1), ("tensor", "data"), (jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "tensor" in refuse_cut_matrices()
    assert refuse_cut_matrices() is None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_logits_on_the_card(shape):
    arguments = _draw(*shape)
    first, second = (_check(arguments, "mosaic_gpu") for _ in range(2))
    assert first.values.dtype == jnp.float16
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.gpu
def test_members_on_the_card():
    members = [_draw(64, 64, 256, scale) for scale in (0.1, 1.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    got = jax.jit(jax.vmap(functools.partial(api.logits, implementation="mosaic_gpu")))(*stacked)
    for i, member in enumerate(members):
        want = api.logits(*member, implementation="mosaic_gpu")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], got), want)
