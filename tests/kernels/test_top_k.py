"""The largest values and their places: the Hopper kernel, lowered and interpreted on a CPU, run on a GPU, is a sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.top_k import mosaic_gpu, reference, top_k

ODD = np.asarray([-np.inf, np.inf, np.nan, 0.0, -0.0, np.finfo(np.float32).min, 1.2e-38], np.float32)


def _values(rows, width, decimals, odd=0.0):
    """The fewer decimals, the more equals; `odd` is the share of values that a comparison of numbers may get wrong."""
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=(2, rows, width)), decimals).astype(np.float32)
    values = np.where(rng.random(values.shape) < odd, rng.choice(ODD, values.shape), values)
    values[0, 0] = -np.inf if odd else values[0, 0]
    return jnp.asarray(values)


def _bias(width, size=1.0):
    return jnp.asarray(np.random.default_rng(1).normal(size=width) * size, jnp.float32)


def _sorted_places(values, bias, k):
    """In the total order of IEEE 754, as a sort on a CPU has it: -0 before 0, NaN behind inf."""
    bits = (np.asarray(values) + np.asarray(bias)).view(np.int32).astype(np.int64)
    order = np.where(bits < 0, -(2**31) - 1 - bits, bits)
    return np.argsort(-order, axis=-1, stable=True)[..., :k]


def test_the_kernel_lowers_for_cuda():
    traced = jax.jit(functools.partial(mosaic_gpu.top_k, k=8)).trace(_values(16, 256, 1), _bias(256))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


def test_the_interpreted_kernel_equals_a_sort(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    values = _values(16, 64, 1, odd=0.3)
    biases = jnp.stack([_bias(64, 0.0), _bias(64)])  # of two models, in one launch
    of_models = jax.jit(jax.vmap(functools.partial(mosaic_gpu.top_k, k=8), in_axes=(None, 0)))(values, biases)
    for bias, places, chosen in zip(biases, *of_models, strict=True):
        np.testing.assert_array_equal(places, _sorted_places(values, bias, 8))
        np.testing.assert_array_equal(chosen, np.take_along_axis(np.asarray(values), np.asarray(places), -1))
        jax.tree.map(np.testing.assert_array_equal, (places, chosen), reference.top_k(values, bias, k=8))


def test_the_gradient_goes_to_the_chosen():
    values, bias, d = _values(4, 8, 6), _bias(8), jnp.asarray([1.0, 2.0, 4.0])
    (places, chosen), pull = jax.vjp(lambda values: top_k(values, bias, 3), values)
    got = pull((np.zeros(places.shape, jax.dtypes.float0), jnp.broadcast_to(d, chosen.shape)))[0]
    np.testing.assert_array_equal(np.take_along_axis(got, np.asarray(places), -1), jnp.broadcast_to(d, chosen.shape))
    assert np.count_nonzero(got) == chosen.size


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="values is int32, must be floating"):
        top_k(jnp.zeros((1, 2, 8), jnp.int32), _bias(8), 2)
    with pytest.raises(ValueError, match="k=9 must be from 1 to E=8"):
        top_k(jnp.zeros((1, 2, 8)), _bias(8), 9)


def test_refusals_name_the_reason():
    values = _values(16, 64, 1)
    assert mosaic_gpu.unserved(values, k=8) is None
    assert "bfloat16" in mosaic_gpu.unserved(values.astype(jnp.bfloat16), k=8)
    assert "E=40" in mosaic_gpu.unserved(values[..., :40], k=8)
    assert "k=20" in mosaic_gpu.unserved(values, k=20)
    assert "rows=18" in mosaic_gpu.unserved(values[:, :9], k=8)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "k"), [(64, 8), (256, 8), (32, 2), (96, 16)])
@pytest.mark.parametrize(("decimals", "odd"), [(1, 0.0), (6, 0.0), (1, 0.3), (6, 0.95)])
def test_the_kernel_equals_a_sort(width, k, decimals, odd):
    values, bias = _values(1024, width, decimals, odd), _bias(width, 0.1 if decimals > 1 else 0.0)
    places, chosen = jax.jit(functools.partial(top_k, k=k, implementation="mosaic_gpu"))(values, bias)
    np.testing.assert_array_equal(places, _sorted_places(values, bias, k))
    np.testing.assert_array_equal(chosen, np.take_along_axis(np.asarray(values), np.asarray(places), -1))
