"""The Hopper kernels of the short convolution: lowered and interpreted on a CPU, run on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.short_conv import mosaic_gpu, reference, short_conv, short_conv_parts
from pallas_kernels.testing import assert_all_close, generator

# Error ratio to the definition in float32, from the same inputs: the rounding of the results; measured 1.7e-3, 2e-4.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}


def _inputs(B, T, D, W=4, dtype="bfloat16"):
    def draw(name, *shape):
        return np.asarray(generator(0, name).standard_normal(shape), jnp.dtype(dtype))

    return draw("x", B, T, D), draw("weight", D, W), draw("cache", B, W - 1, D), draw("dy", B, T, D)


def _segments(kind: str, B: int, T: int) -> np.ndarray | None:
    if kind == "none":
        return None
    packed = np.sort(generator(0, "packed").integers(1, 2 + T // 6, (B, T)), axis=1).astype(np.int32)
    if kind == "packed":
        return packed
    return np.where(generator(0, "holes").random((B, T)) < 0.3, 0, packed).astype(np.int32)


def _values_and_gradients(convolve, x, weight, cache, dy, ids):
    def values(x, weight, cache):
        return convolve(x, weight, cache=cache, segment_ids=ids)

    (y, last), pull_back = jax.vjp(values, x, weight, cache)
    dx, d_weight, d_cache = pull_back((jnp.asarray(dy, y.dtype), jnp.ones_like(last)))
    gradients = {"dx": dx, "dweight": d_weight} | ({} if cache is None else {"dcache": d_cache})
    return {"y": y, "cache": last, **gradients}


def _joined(convolve, cuts):
    """`convolve`, which returns what begins at 0 and at `cuts`, as one that returns the whole."""

    def whole(x, weight, **optional):
        *ys, last = convolve(x, weight, cuts=cuts, **optional)
        return jnp.concatenate(ys, axis=2), last

    return whole


def _want(x, weight, cache, dy, ids):
    wide = [None if a is None else jnp.asarray(a, jnp.float32) for a in (x, weight, cache, dy)]
    return jax.jit(functools.partial(_values_and_gradients, reference.short_conv))(*wide, ids)


LOWERED = {  # B, T, D, W, segments, cache, cuts
    "training": (2, 4096, 3072, 4, "none", False, (1024, 2048)),
    "packed": (2, 200, 384, 4, "packed", False, ()),
    "prefill": (3, 32, 256, 3, "holes", True, ()),
}


@pytest.mark.parametrize("settings", LOWERED.values(), ids=LOWERED)
def test_every_configuration_lowers_for_cuda(settings):
    B, T, D, W, segments, carried, cuts = settings
    x, weight, cache, dy = _inputs(B, T, D, W)
    convolve = _joined(mosaic_gpu.short_conv, cuts)
    call = functools.partial(_values_and_gradients, convolve, ids=_segments(segments, B, T))
    traced = jax.jit(call).trace(x, weight, cache if carried else None, dy)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    for name, value in {"TOKENS": 32, "GRADIENT_TOKENS": 32, "TILES": 2}.items():  # tiles are used again
        monkeypatch.setattr(mosaic_gpu, name, value)


INTERPRETED = {  # segments, cache, D, cuts
    "none": ("none", False, 384, (128,)),
    "holes": ("holes", False, 128, ()),
    "cache": ("holes", True, 256, (128,)),
}


@pytest.mark.parametrize("settings", INTERPRETED.values(), ids=INTERPRETED)
def test_the_interpreted_kernels_equal_the_definition(settings, interpreted):
    """Padding holds nan."""
    (segments, carried, D, cuts), B, T = settings, 2, 40
    x, weight, cache, dy = _inputs(B, T, D)
    ids = _segments(segments, B, T)
    if ids is not None:
        x, dy = (np.where((ids == 0)[..., None], a.dtype.type(np.nan), a) for a in (x, dy))
    arguments = (x, weight, cache if carried else None, dy, ids)
    got = jax.jit(functools.partial(_values_and_gradients, _joined(mosaic_gpu.short_conv, cuts)))(*arguments)
    assert_all_close(got, _want(*arguments), TOLERANCE["bfloat16"])


def test_places_of_padding_and_documents():
    ids = np.array([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 0, 0, 0, 0, 0, 4]], np.int32)
    order, reach = mosaic_gpu.compact(ids, 4)
    np.testing.assert_array_equal(order, [[1, 2, 4, 5, 6, 0, 3, 7], [0, 1, 7, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(reach, [[3, 3, 3, 0, 1, -1, -1, -1], [3, 3, 0, -1, -1, -1, -1, -1]])


def test_refusals_name_the_reason():
    x, weight = jnp.zeros((1, 16, 256), jnp.bfloat16), jnp.zeros((256, 4))
    assert mosaic_gpu.unserved(x, weight) is None
    assert "float32" in mosaic_gpu.unserved(x.astype(jnp.float32), weight)
    assert "T=1," in mosaic_gpu.unserved(x[:, :1], weight)
    assert "D=100" in mosaic_gpu.unserved(x[..., :100], weight[:100])
    assert "D=(100, 156)" in mosaic_gpu.unserved(x, weight, (100,))
    assert "W=5" in mosaic_gpu.unserved(x, jnp.zeros((256, 5)))
    if jax.default_backend() != "gpu":
        assert "GPU" in mosaic_gpu.refuse(x, weight)


ON_GPU = {  # B, T, D, W, dtype, cache, widths
    "training": (2, 1024, 1024, 4, "bfloat16", False, (1024,)),
    "joined": (2, 1024, 1536, 4, "bfloat16", False, (512, 256, 768)),
    "tail": (3, 200, 384, 4, "bfloat16", False, (384,)),
    "prefill": (2, 72, 512, 3, "float16", True, (512,)),
    "joined prefill": (2, 72, 512, 3, "float16", True, (128, 128, 256)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("segments", ["none", "packed", "holes"])
@pytest.mark.parametrize("settings", ON_GPU.values(), ids=ON_GPU)
def test_the_kernels_equal_the_definition(settings, segments):
    B, T, D, W, dtype, carried, widths = settings
    x, weight, cache, dy = _inputs(B, T, D, W, dtype)
    ids = _segments(segments, B, T)
    if ids is not None:
        x, dy = (np.where((ids == 0)[..., None], a.dtype.type(np.nan), a) for a in (x, dy))
    arguments = (x, weight, cache if carried else None, dy, ids)

    def convolve(x, weight, **optional):
        ys, last = short_conv_parts(x, weight, widths, implementation="mosaic_gpu", **optional)
        return jnp.concatenate(ys, axis=2), last

    run = jax.jit(functools.partial(_values_and_gradients, convolve))
    got = run(*arguments)
    assert_all_close(got, _want(*arguments), TOLERANCE[dtype])
    for name, again in run(*arguments).items():
        np.testing.assert_array_equal(again, got[name])


@pytest.mark.gpu
def test_auto_takes_the_kernels():
    x, weight, _, _ = _inputs(1, 64, 128)
    assert "mosaic" in jax.jit(short_conv).lower(x, weight).as_text()
