"""Logits against float64, and the gradients of their cross-entropy in both forms against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.logits import api, mosaic_gpu, relative, xla
from pallas_kernels.partition import refuse_cut_matrices

Z_WEIGHT = 0.1
# rows, width, vocabulary, scale of the weight: whole tiles; rows left over, tiles of 192, columns left over
GPU_SHAPES = [
    (512, 1024, 32768, 0.03),
    (1000, 1216, 4096, 0.1),
    (5, 64, 384, 1.0),
    (129, 512, 264, 0.2),
    (16, 64, 101, 0.5),
]
# Largest ratio of the RMS of an error to that of the result of the plain form in float32: (bound, measured). The plain
# form in bfloat16 itself: 2.4e-3 and 1.8e-3; the other one also rounds x times the factor of its row.
TOLERANCE = {
    "float32": {"lse": (1e-6, 5.0e-8), "target": (1e-6, 1.2e-7), "d_x": (5e-6, 5.5e-7), "d_weight": (5e-6, 5.1e-7)},
    "bfloat16": {"lse": (1e-6, 6.4e-8), "target": (1e-6, 4.6e-8), "d_x": (4e-3, 2.4e-3), "d_weight": (4e-3, 2.4e-3)},
}


def _draw(rows, width, vocab, scale, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    weight = jnp.asarray(rng.normal(size=(width, vocab)) * scale, dtype)
    share = jnp.where(jnp.arange(rows) % 7 == 3, 0.0, 1 / rows)  # every seventh counts for nothing
    return x, weight, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32), share


def _ratio(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def _compare(got, arguments, dtype):
    x, weight, targets, share = arguments
    exact = (x.astype(jnp.float32), weight.astype(jnp.float32), targets, share)
    want = api.cross_entropy_gradients(*exact, z_weight=Z_WEIGHT, implementation="xla")
    assert got.d_x.dtype == dtype
    assert not np.any(np.asarray(got.d_x, np.float32)[np.asarray(share) == 0])
    names = dict(zip(("lse", "target", "d_x", "d_weight"), zip(got, want, strict=True), strict=True))
    errors = {name: _ratio(*pair) for name, pair in names.items()}
    print(dtype, x.shape, {name: f"{error:.1e}" for name, error in errors.items()})
    for name, error in errors.items():
        assert error <= TOLERANCE[dtype][name][0], f"{name}: {error:.2e}"


def _plain_exponentials(x, weight, reference):
    """What the kernel computes."""
    values = jnp.einsum("MD,DA->MA", x, weight, preferred_element_type=jnp.float32)
    powers = jnp.exp2(jnp.minimum((values - reference[:, None]) * np.log2(np.e), relative.HIGHEST))
    return powers.astype(x.dtype), jnp.sum(powers, 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_plain_logits(dtype):
    x, weight, targets, _ = _draw(37, 24, 101, 1.0, dtype)
    got = api.logits(x, weight, targets)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    assert got.values.dtype == jnp.float32
    np.testing.assert_allclose(got.values, want, atol=1e-5)  # measured 3.8e-6
    np.testing.assert_allclose(got.log_sum_exp, np.log(np.exp(want).sum(1)), atol=1e-5)  # measured 1.9e-6
    np.testing.assert_array_equal(got.target, got.values[np.arange(37), targets])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_from_relative_exponentials(dtype):
    arguments = _draw(60, 32, 301, 1.0, dtype)
    got = relative.cross_entropy_gradients(_plain_exponentials, *arguments, Z_WEIGHT, ())
    _compare(api.Gradients(*got), arguments, dtype)


def test_logits_far_above_the_target_stay_finite():
    arguments = _draw(60, 32, 301, 30.0, "float32")
    got = relative.cross_entropy_gradients(_plain_exponentials, *arguments, Z_WEIGHT, ())
    assert all(np.isfinite(x).all() for x in got)


def test_one_pass_over_the_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1031)) * 30, jnp.float32)
    logits = logits.at[0, 0].set(-1e20).at[0, 1, 5].set(3e4)
    want = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(jax.jit(xla.log_sum_exp_in_one_pass)(logits), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "word"),
    [((8, 64), jnp.float32, "bfloat16"), ((8, 72), jnp.bfloat16, "multiples of 64")],
)
def test_what_the_kernel_refuses(shape, dtype, word):
    assert word in mosaic_gpu.unserved(jnp.zeros(shape, dtype))


@pytest.mark.parametrize(("down", "across"), [(256, 3), (37, 5), (1, 2)])
def test_every_tile_once(down, across):
    rows, columns = mosaic_gpu.place(jnp.arange(down * across), down, across)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == list(np.ndindex(down, across))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_column_that_is_no_number_is_not_hidden(bad):
    """A target or not: training stops at a gradient that is not finite."""
    x, weight, targets, scale = _draw(8, 16, 32, 1.0, dtype=jnp.float32)
    got = api.cross_entropy_gradients(x, weight.at[:, 5].set(bad), targets, scale, z_weight=Z_WEIGHT)
    assert not np.isfinite(got.log_sum_exp).any() and not np.isfinite(np.asarray(got.d_x, np.float32)).any()


def test_mistakes_are_named():
    x, weight = np.zeros((7, 6), np.float32), np.zeros((6, 9), np.float32)
    targets, scale = np.zeros(7, np.int32), np.zeros(7, np.float32)
    for change, message in (
        ({"targets": targets[:1]}, "targets has shape"),
        ({"targets": scale}, "targets is float32, must be integer"),
        ({"weight": weight[:, None]}, r"weight has shape .*, must be \(6, A\)"),
        ({"scale": scale[:1]}, "scale has shape"),
        ({"weight": weight.astype(np.float16)}, "must be of one dtype"),
    ):
        arguments = {"x": x, "weight": weight, "targets": targets, "scale": scale} | change
        with pytest.raises(ValueError, match=message):
            api.cross_entropy_gradients(**arguments, z_weight=0.0)


def test_a_head_cut_over_devices_is_left_to_xla():
    mesh = jax.sharding.AbstractMesh((2, 1), ("tensor", "data"), (jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "tensor" in refuse_cut_matrices()
    assert refuse_cut_matrices() is None


_on_the_card = functools.partial(api.cross_entropy_gradients, z_weight=Z_WEIGHT, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_exponentials_on_the_card(shape):
    x, weight, _, _ = _draw(*shape)
    reference = jnp.asarray(np.random.default_rng(1).normal(size=x.shape[0]), jnp.float32)
    powers, totals = jax.jit(mosaic_gpu.exponentials)(x, weight, reference)
    want = np.exp(np.asarray(x, np.float64) @ np.asarray(weight, np.float64) - np.asarray(reference)[:, None])
    np.testing.assert_allclose(np.asarray(powers, np.float64), want, rtol=2.0**-8)  # rounded to 8 bits
    np.testing.assert_allclose(totals, want.sum(1), rtol=1e-4)  # 2.5e-5: the error of a logit of 17


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gradients_on_the_card(shape):
    arguments = _draw(*shape)
    first, second = (jax.jit(_on_the_card)(*arguments) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _compare(first, arguments, "bfloat16")


@pytest.mark.gpu
def test_members_on_the_card():
    members = [_draw(64, 64, 256, scale) for scale in (0.1, 1.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    got = jax.jit(jax.vmap(_on_the_card))(*stacked)
    for i, member in enumerate(members):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], got), _on_the_card(*member))
