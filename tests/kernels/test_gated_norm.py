"""The gated RMS norm: its definition, and its Hopper kernels lowered and interpreted on a CPU, run on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_norm import gated_rms_norm, mosaic_gpu, reference
from pallas_kernels.testing import assert_all_close, generator

# Error ratio to the definition in float32, from the same inputs: the rounding of the results; measured 1.7e-3, 2e-4.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}
EPS = 1e-5
SHAPES = {"sigmoid": (2, 24, 4, 128), "silu": (1, 16, 2, 64)}


def _inputs(*shape, dtype="bfloat16"):
    x, logits, dy = (generator(0, n).standard_normal(shape).astype(jnp.dtype(dtype)) for n in ("x", "logits", "dy"))
    return x, logits, generator(0, "weight").standard_normal(shape[-1:]).astype(np.float32), dy


def _values_and_gradients(function, activation, x, logits, weight, dy):
    y, pull_back = jax.vjp(functools.partial(function, eps=EPS, activation=activation), x, logits, weight)
    return dict(zip(("y", "dx", "dlogits", "dweight"), (y, *pull_back(jnp.asarray(dy, y.dtype))), strict=True))


def _want(activation, *arrays):
    wide = (jnp.asarray(x, jnp.float32) for x in arrays)
    return jax.jit(functools.partial(_values_and_gradients, reference.gated_rms_norm, activation))(*wide)


def test_the_definition_is_the_formula():
    x, logits, weight, _ = _inputs(2, 3, 8, dtype="float32")
    for activation, f in (("sigmoid", lambda z: 1 / (1 + np.exp(-z))), ("silu", lambda z: z / (1 + np.exp(-z)))):
        want = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS) * weight * f(logits)
        np.testing.assert_allclose(gated_rms_norm(x, logits, weight, eps=EPS, activation=activation), want, rtol=1e-5)


@pytest.mark.parametrize("activation", SHAPES)
def test_the_kernels_lower_for_cuda(activation):
    call = jax.jit(functools.partial(_values_and_gradients, mosaic_gpu.gated_rms_norm, activation))
    lowered = call.trace(*_inputs(*SHAPES[activation])).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 2


@pytest.mark.parametrize("activation", SHAPES)
def test_the_interpreted_kernels_equal_the_definition(activation, monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 1)
    arrays = _inputs(*SHAPES[activation])
    got = jax.jit(functools.partial(_values_and_gradients, mosaic_gpu.gated_rms_norm, activation))(*arrays)
    assert_all_close(got, _want(activation, *arrays), TOLERANCE["bfloat16"])


def test_refusals_name_the_reason():
    x = jnp.zeros((2, 16, 128), jnp.bfloat16)
    assert mosaic_gpu.unserved(x, x) is None
    assert "float32" in mosaic_gpu.unserved(x, x.astype(jnp.float32))
    assert "V=96" in mosaic_gpu.unserved(x[..., :96], x[..., :96])
    assert "rows=30" in mosaic_gpu.unserved(x[:, :15], x[:, :15])
    if jax.default_backend() != "gpu":
        assert "GPU" in mosaic_gpu.refuse(x, x, None)


def test_mistakes_are_named():
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), must be \(8,\)"):
        gated_rms_norm(x, x, np.zeros(4, np.float32), eps=EPS)
    with pytest.raises(ValueError, match="activation='tanh' must be one of sigmoid, silu"):
        gated_rms_norm(x, x, np.zeros(8, np.float32), eps=EPS, activation="tanh")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 1000, 8, 128), (1, 528, 2, 64), (1, 512, 4, 256)], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_the_kernels_equal_the_definition(activation, shape, dtype):
    arrays = _inputs(*shape, dtype=dtype)
    kernels = functools.partial(gated_rms_norm, implementation="mosaic_gpu")
    run = jax.jit(functools.partial(_values_and_gradients, kernels, activation))
    got = run(*arrays)
    assert_all_close(got, _want(activation, *arrays), TOLERANCE[dtype])
    for name, again in run(*arrays).items():
        np.testing.assert_array_equal(again, got[name])
