"""The RMS norm's gradients: their definition, and the Hopper kernel lowered and interpreted on a CPU, run on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.rms_norm import mosaic_gpu, reference, rms_norm_gradients
from pallas_kernels.testing import assert_all_close, generator

EPS = 1e-5
# Error ratio to the definition in float32, from the same inputs: the rounding of the result; measured 1.7e-3, 2e-4.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}


def _inputs(*shape, dtype="bfloat16"):
    draw = lambda name, shape: generator(0, name).standard_normal(shape)
    x, dy, d_beside = (draw(name, shape).astype(jnp.dtype(dtype)) for name in ("x", "dy", "d_beside"))
    return x, draw("weight", shape[-1:]).astype(np.float32), dy, d_beside


def _gradients(function, *arrays):
    dx, d_weight = function(*arrays, eps=EPS)
    return {"dx": dx, "d_weight": jnp.sum(d_weight, axis=tuple(range(d_weight.ndim - 1)))}


def _want(*arrays):
    wide = (jnp.asarray(x, jnp.float32) for x in arrays)
    return jax.jit(functools.partial(_gradients, reference.rms_norm_gradients))(*wide)


def test_the_definition_is_the_gradient_of_both_ways():
    x, weight, dy, d_beside = (jnp.asarray(a, jnp.float32) for a in _inputs(2, 5, 24))

    def norm_and_x(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * weight[None, None, :], x

    want = jax.vjp(norm_and_x, x, weight)[1]((dy, d_beside))
    assert_all_close(
        _want(x, weight, dy, d_beside), dict(zip(("dx", "d_weight"), want, strict=True)), 1e-6
    )  # measured 7e-8
    alone = jax.vjp(norm_and_x, x, weight)[1]((dy, jnp.zeros_like(x)))
    got = rms_norm_gradients(x, weight, dy, None, eps=EPS)
    assert_all_close(dict(enumerate(got)), dict(enumerate(alone)), 1e-6)


@pytest.mark.parametrize("width", [1024, 1216])
def test_the_kernel_lowers_for_cuda(width):
    call = jax.jit(functools.partial(mosaic_gpu.rms_norm_gradients, eps=EPS))
    assert call.trace(*_inputs(1, 64, width)).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


def test_the_interpreted_kernel_equals_the_definition(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 1)
    arrays = _inputs(2, 18, 128)  # nine groups of rows for two blocks, two of which each has on their way
    got = jax.jit(functools.partial(_gradients, mosaic_gpu.rms_norm_gradients))(*arrays)
    assert_all_close(got, _want(*arrays), TOLERANCE["bfloat16"])


def test_refusals_name_the_reason():
    x = jnp.zeros((2, 64, 128), jnp.bfloat16)
    assert mosaic_gpu.unserved(x, x) is None
    assert "None" in mosaic_gpu.unserved(x, None)
    assert "float32" in mosaic_gpu.unserved(x.astype(jnp.float32), x)
    assert "D=96" in mosaic_gpu.unserved(x[..., :96], x)
    assert "B * T=6:" in mosaic_gpu.unserved(x[:, :3], x)


def test_mistakes_are_named():
    x = np.zeros((2, 4, 8), np.float32)
    with pytest.raises(ValueError, match=r"x has shape .*, must be \(B, T, D\)"):
        rms_norm_gradients(x[0], x[0, 0], x[0], None, eps=EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(1,\), must be \(8,\)"):
        rms_norm_gradients(x, x[0, 0, :1], x, None, eps=EPS)
    with pytest.raises(ValueError, match="dy is float16: must be of one dtype"):
        rms_norm_gradients(x, x[0, 0], x.astype(np.float16), None, eps=EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 1024, 1024), (1, 64, 1216), (3, 128, 384)], ids=str)
def test_the_kernel_equals_the_definition(shape, dtype):
    arrays = _inputs(*shape, dtype=dtype)
    run = jax.jit(functools.partial(rms_norm_gradients, eps=EPS, implementation="mosaic_gpu"))
    got = dict(zip(("dx", "d_weight"), run(*arrays), strict=True))
    assert_all_close(got, _want(*arrays), TOLERANCE[dtype])
    for again, once in zip(run(*arrays), got.values(), strict=True):
        np.testing.assert_array_equal(again, once)


@pytest.mark.gpu
def test_members_have_gains_of_their_own():
    members = [_inputs(2, 64, 128), tuple(2 * a for a in _inputs(2, 64, 128))]
    run = functools.partial(rms_norm_gradients, eps=EPS, implementation="mosaic_gpu")
    got = jax.jit(jax.vmap(run))(*(np.stack(a) for a in zip(*members, strict=True)))
    for i, member in enumerate(members):
        dx, d_weight = run(*map(jnp.asarray, member))
        np.testing.assert_array_equal(got[0][i], dx)
        np.testing.assert_allclose(got[1][i], d_weight, rtol=1e-5)  # XLA adds the parts in another order: 1.5e-6
