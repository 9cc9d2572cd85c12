"""Places of the largest values: the Hopper kernel lowered and interpreted on a CPU, run on a GPU, against a sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.top_k import mosaic_gpu, reference, top_k


def _values(rows, width, decimals):
    """The fewer decimals, the more equals."""
    return jnp.asarray(np.round(np.random.default_rng(0).normal(size=(2, rows, width)), decimals), jnp.float32)


def test_the_kernel_lowers_for_cuda():
    call = jax.jit(functools.partial(mosaic_gpu.top_k, k=8))
    assert call.trace(_values(16, 256, 1)).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


def test_the_interpreted_kernel_equals_a_sort(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    values = _values(16, 64, 1)
    got = jax.jit(functools.partial(mosaic_gpu.top_k, k=4))(values)
    np.testing.assert_array_equal(got, reference.top_k(values, k=4))


def test_refusals_name_the_reason():
    values = _values(16, 64, 1)
    assert mosaic_gpu.unserved(values, k=8) is None
    assert "bfloat16" in mosaic_gpu.unserved(values.astype(jnp.bfloat16), k=8)
    assert "E=40" in mosaic_gpu.unserved(values[..., :40], k=8)
    assert "k=20" in mosaic_gpu.unserved(values, k=20)
    assert "rows=18" in mosaic_gpu.unserved(values[:, :9], k=8)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "k"), [(64, 8), (256, 8), (32, 2), (96, 16)])
@pytest.mark.parametrize("decimals", [1, 6])
def test_the_kernel_equals_a_sort(width, k, decimals):
    values = _values(1024, width, decimals)
    got = jax.jit(functools.partial(top_k, k=k, implementation="mosaic_gpu"))(values)
    np.testing.assert_array_equal(got, jax.lax.top_k(values, k)[1])


@pytest.mark.gpu
def test_what_is_no_number_has_a_place_all_the_same():
    values = _values(1024, 64, 6).at[0, 3, :].set(jnp.nan)
    places = jax.jit(functools.partial(top_k, k=8, implementation="mosaic_gpu"))(values)
    assert np.all((np.asarray(places) >= 0) & (np.asarray(places) < 64))
