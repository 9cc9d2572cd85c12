"""Products of symmetric matrices against float64, and which of their tiles are computed and read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.symmetric_matmul import api, mosaic_gpu

TERMS = {"quadratic": {"a": 3.4445, "b": -4.775, "c": 2.0315}, "square": {"a": 0.0, "b": 0.0, "c": 1.0}}
NAMES = ("gram", "multiply", "quadratic", "square", "apply")  # a square is a quadratic without the other terms
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
        "quadratic": lambda: 3.4445 * np.eye(r.shape[1]) - 4.775 * r + 2.0315 * r @ r,
        "square": lambda: r @ r,
        "apply": lambda: r @ x if wide else x @ r,
    }[name]()


def _compile(name, implementation):
    """The product as a function of x, r and s."""
    product = api.quadratic if name in TERMS else getattr(api, name)
    run = functools.partial(product, implementation=implementation, **TERMS.get(name, {}))
    places = {"gram": (0,), "multiply": (1, 2), "apply": (1, 0)}.get(name, (1,))
    return jax.jit(lambda *arrays: run(*(arrays[i] for i in places)))


def _defined(side):
    """Elements of the blocks of 128 up to the diagonal."""
    block = np.arange(side) // 128
    return block[:, None] >= block


def _check(name, shape, dtype, want, got):
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    print(f"{name} {shape} {jnp.dtype(dtype)}: {error:.1e}")
    assert got.dtype == dtype and error < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_products(name, shape):
    stored, exact = _draw(shape, jnp.float32)
    _check(name, shape, jnp.float32, _want(name, *exact), _compile(name, "xla")(*stored))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
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


def _describe_both(describe, number):
    """What the two blocks of every pair do: lists of tiles of plain integers."""
    both = [jax.jit(jax.vmap(functools.partial(describe, second=second)))(jnp.arange(number)) for second in (0, 1)]
    return [[mosaic_gpu.Tile(*tile) for tile in zip(*(part.tolist() for part in parts), strict=True)] for parts in both]


@pytest.mark.parametrize("side", [1, 2, 5, 8])
@pytest.mark.parametrize("square", [False, True])
def test_every_tile_of_a_symmetric_result_once(side, square):
    describe, number = mosaic_gpu.describe_half(side, 8, square=square)
    first, second = _describe_both(describe, 3 * number)
    lower = {(matrix, row, column) for matrix in range(3) for row in range(side) for column in range(row + 1)}
    assert {tile[:3] for tile in first + second} == lower
    assert 2 * number <= len(lower) // 3 + 1
    common = [[tile.row if tile.role == mosaic_gpu.ROW else tile.column for tile in tiles] for tiles in (first, second)]
    assert common[0] == common[1], "the two of a pair have an index in common"
    on_the_diagonal = {tile.row == tile.column for tile in first + second if tile.role == mosaic_gpu.BOTH}
    assert on_the_diagonal == ({True} if square else set())


def test_every_tile_of_another_result_once():
    describe, number = mosaic_gpu.describe_all(5, 4, 8)
    first, second = _describe_both(describe, 3 * number)
    inside = {tile[:3] for tile in first + second if tile.row < 5}
    assert inside == {(matrix, row, column) for matrix in range(3) for row in range(5) for column in range(4)}
    assert number == 12 and len(set(first + second)) == 72
    assert [tile.column for tile in first] == [tile.column for tile in second]


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_can_be_traced(name):
    x, r = (jax.ShapeDtypeStruct((2, *sides), jnp.float16) for sides in ((192, 320), (192, 192)))
    arguments = {"gram": (x,), "multiply": (r, r), "apply": (r, x)}.get(name, (r,))
    product = mosaic_gpu.quadratic if name in TERMS else getattr(mosaic_gpu, name)
    result = jax.eval_shape(functools.partial(product, **TERMS.get(name, {})), *arguments)
    assert result == (x if name == "apply" else r)


def test_what_the_kernel_refuses():
    x = jnp.zeros((2, 100, 128), jnp.float16)
    assert "multiples of 64, at least 128, got 100 x 128" in mosaic_gpu.unserved(x)
    assert "got float32" in mosaic_gpu.unserved(x.astype(jnp.float32))
    assert "got 64 x 128" in mosaic_gpu.unserved(x[:, :64])
    assert mosaic_gpu.unserved(jnp.zeros((2, 128, 192), jnp.bfloat16)) is None
    with pytest.raises(NotImplementedError, match=r"gram: .*mosaic_gpu: "):
        api.gram(x, implementation="mosaic_gpu")
