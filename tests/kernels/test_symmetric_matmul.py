"""Products of symmetric matrices against float64, also in the interpreter, and which tiles are computed and read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles_mosaic_gpu
from pallas_kernels.symmetric_matmul import api, mosaic_gpu

TERMS = {"a": 3.4445, "b": -4.775, "c": 2.0315}
# Largest difference over largest magnitude. Measured: bfloat16 3.6e-3, float16 4.1e-4 (H200), float32 1.2e-6 (CPU).
TOLERANCE = {jnp.bfloat16: 5e-3, jnp.float16: 7e-4, jnp.float32: 5e-6}
SHAPES = [(3, 192, 320), (3, 320, 192), (2, 128, 128)]
GPU_SHAPES = [(3, 512, 1024), (70, 1024, 512), (5, 1024, 1024), (3, 576, 1024), (2, 1024, 128), (1, 192, 192)]


def _draw(shape, dtype):
    """Matrices, and two symmetric ones that commute: polynomials of the Gram matrix; as stored, in float64 too."""
    x = np.random.default_rng(0).normal(size=shape) / np.sqrt(max(shape[1:]))
    r = x @ x.swapaxes(1, 2) if shape[1] <= shape[2] else x.swapaxes(1, 2) @ x
    stored = [jnp.asarray(m, dtype) for m in (x, r, r @ r)]
    return stored, [np.asarray(m, np.float64) for m in stored]


def _want(name, x, r, s):
    wide = x.shape[1] <= x.shape[2]
    return {
        "gram": lambda: x @ x.swapaxes(1, 2) if wide else x.swapaxes(1, 2) @ x,
        "multiply": lambda: r @ s,
        "quadratic": lambda: TERMS["a"] * np.eye(r.shape[1]) + TERMS["b"] * r + TERMS["c"] * r @ r,
        "apply": lambda: r @ x if wide else x @ r,
    }[name]()


def _compile(name, implementation):
    """The product as a function of x, r and s."""
    settings = TERMS if name == "quadratic" else {}
    run = functools.partial(getattr(api, name), implementation=implementation, **settings)
    places = {"gram": (0,), "multiply": (1, 2), "quadratic": (1,), "apply": (1, 0)}[name]
    return jax.jit(lambda *arrays: run(*(arrays[i] for i in places)))


def _defined(side):
    """Elements of the blocks of 128 up to the diagonal."""
    block = np.arange(side) // 128
    return block[:, None] >= block


def _check(name, shape, dtype, want, got):
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    print(f"{name} {shape} {jnp.dtype(dtype)}: {error:.1e}")
    assert got.dtype == dtype and error < TOLERANCE[dtype]


@pytest.mark.parametrize("name", api.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_products(name, shape):
    stored, exact = _draw(shape, jnp.float32)
    _check(name, shape, jnp.float32, _want(name, *exact), _compile(name, "xla")(*stored))


@pytest.mark.gpu
@pytest.mark.parametrize("name", api.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_the_kernel(name, shape, dtype):
    """What lies beyond the diagonal is neither read nor, in a symmetric result, defined."""
    (x, r, s), exact = _draw(shape, dtype)
    r, s = (jnp.where(_defined(r.shape[1]), m, jnp.nan) for m in (r, s))
    run = _compile(name, "mosaic_gpu")
    got, again = (np.asarray(run(x, r, s)) for _ in range(2))
    want = _want(name, *exact)
    if name != "apply":
        want, got, again = (np.where(_defined(m.shape[1]), m, 0) for m in (want, got, again))
    _check(name, shape, dtype, want, got)
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize(
    "name", ["quadratic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gram", "multiply", "apply"))]
)
def test_the_kernel_in_the_interpreter(name, monkeypatch):
    """Two blocks share the tiles, so that loads run on over the end of one."""
    monkeypatch.setattr(tiles_mosaic_gpu, "MULTIPROCESSORS", 2)
    (x, r, s), exact = _draw((2, 192, 256), jnp.float16)
    r, s = (jnp.where(_defined(192), m, jnp.nan) for m in (r, s))
    run = functools.partial(getattr(mosaic_gpu, name), **(TERMS if name == "quadratic" else {}))
    with plgpu.force_gpu_interpret_mode():
        got = np.asarray(run(*{"gram": (x,), "multiply": (r, s), "quadratic": (r,), "apply": (r, x)}[name]))
    want = _want(name, *exact)
    if name != "apply":
        want, got = (np.where(_defined(192), m, 0) for m in (want, got))
    _check(name, x.shape, jnp.float16, want, got)


@pytest.mark.parametrize(("symmetric", "expected"), [(True, 15), (False, 20)])
def test_every_tile_once(symmetric, expected):
    describe, number = mosaic_gpu.describe_tiles(5, 4, 8, symmetric=symmetric)
    tiles = jax.vmap(describe)(jnp.arange(3 * number))
    found = set(zip(*(np.asarray(part).tolist() for part in tiles[:3]), strict=True))
    inside = lambda row, column: column <= row if symmetric else column < 4
    assert number == expected and len(found) == 3 * expected
    assert all(0 <= row < 5 and inside(row, column) for _, row, column in found)


@pytest.mark.parametrize("name", api.IMPLEMENTATIONS)
def test_the_kernel_can_be_traced(name):
    x, r = (jax.ShapeDtypeStruct((2, *sides), jnp.float16) for sides in ((192, 320), (192, 192)))
    arguments = {"gram": (x,), "multiply": (r, r), "quadratic": (r,), "apply": (r, x)}[name]
    run = functools.partial(getattr(mosaic_gpu, name), **(TERMS if name == "quadratic" else {}))
    assert jax.eval_shape(run, *arguments) == (x if name == "apply" else r)


def test_wrong_arguments_are_named():
    x = jnp.zeros((2, 4, 8))
    with pytest.raises(ValueError, match=r"apply: q has shape \(1, 4, 4\), must be \(2, 4, 4\)"):
        api.apply(jnp.zeros((1, 4, 4)), x)
    with pytest.raises(ValueError, match=r"quadratic: x has shape \(2, 4, 8\), must be \(2, 4, 4\)"):
        api.quadratic(x, a=1.0, b=1.0, c=1.0)
    with pytest.raises(ValueError, match="multiply: x is float32, y is bfloat16: must be of one dtype"):
        api.multiply(x[:, :, :4], x[:, :, :4].astype(jnp.bfloat16))


def test_what_the_kernel_refuses():
    x = jnp.zeros((2, 100, 128), jnp.float16)
    assert "multiples of 64, at least 128, got 100 x 128" in mosaic_gpu.unserved(x)
    assert "got float32" in mosaic_gpu.unserved(x.astype(jnp.float32))
    assert "got 64 x 128" in mosaic_gpu.unserved(x[:, :64])
    assert mosaic_gpu.unserved(jnp.zeros((2, 128, 192), jnp.bfloat16)) is None
    with pytest.raises(NotImplementedError, match=r"gram: .*mosaic_gpu: "):
        api.gram(x, implementation="mosaic_gpu")
