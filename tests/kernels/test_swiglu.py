"""The dense SwiGLU with the products around it against float64; the Hopper kernels in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles_mosaic_gpu
from pallas_kernels.grouped_matmul.tiles import TileConfig, plan_tiles
from pallas_kernels.swiglu import mosaic_gpu, swiglu_product, swiglu_product_gradient

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Largest error over the largest magnitude of float64; measured 3.5e-7, 9.4e-3: both products and the gradient of the
# hidden rows are rounded on the way.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.4e-2, "float16": 2e-3}


def draw(rows, D, F, dtype, models=()):
    """x, gate, up, dy, down; products of them have a variance near 1."""
    rng = np.random.default_rng(0)
    scaled = lambda scale, *shape: jnp.asarray(scale * rng.standard_normal((*models, *shape)), dtype)
    return [
        scaled(1.0, *rows, D),
        *(scaled(D**-0.5, D, F) for _ in range(2)),
        scaled(1.0, *rows, D),
        scaled(F**-0.5, F, D),
    ]


def exact(x, gate, up, dy, down):
    """Hidden rows, both products, their gradients, in float64."""
    x, gate, up, dy, down = (np.asarray(a, np.float64) for a in (x, gate, up, dy, down))
    g, u, d_hidden = x @ gate, x @ up, dy @ down.T
    sigmoid = 1 / (1 + np.exp(-g))
    gradients = d_hidden * u * sigmoid * (1 + g * (1 - sigmoid)), d_hidden * g * sigmoid
    return g * sigmoid * u, np.stack([g, u], -2), np.stack(gradients, -2)


def run(product, gradient):
    def both(x, gate, up, dy, down):
        hidden, products = product(x, gate, up)
        return hidden, products, gradient(dy, down, products)

    return both


def check(got, want, dtype):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        error = np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))
        assert error <= TOLERANCE[dtype], f"result {i}: error {error:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_float64(dtype):
    arrays = draw((3, 32), 32, 48, dtype)
    check(jax.jit(run(swiglu_product, swiglu_product_gradient))(*arrays), exact(*arrays), dtype)


def test_wrong_arguments_are_named():
    x, w = jnp.zeros((2, 4, 8)), jnp.zeros((8, 6))
    with pytest.raises(ValueError, match=r"up has shape \(6, 8\), must be \(8, 6\)"):
        swiglu_product(x, w, w.T)
    with pytest.raises(ValueError, match=r"gate is float16"):
        swiglu_product(x, w.astype(jnp.float16), w)
    with pytest.raises(ValueError, match=r"both has shape \(2, 4, 3, 6\), must hold 2 products"):
        swiglu_product_gradient(x, w.T, jnp.zeros((2, 4, 3, 6)))


@pytest.mark.parametrize(
    ("x", "w", "why"),
    [
        ((2, 64, 128), (128, 200), "widths (128, 200) must be multiples of 64"),
        ((1, 64, 128), (128, 256), "B T = 64 must be a multiple of 8, at least 128"),
        ((1, 130, 128), (128, 256), "B T = 130 must be a multiple of 8"),
        ((2, 64, 128), (128, 256), None),
    ],
)
def test_the_kernels_say_what_they_do_not_serve(x, w, why):
    got = mosaic_gpu.unserved(jnp.zeros(x, jnp.bfloat16), jnp.zeros(w, jnp.bfloat16))
    assert got == why if why is None else why in got


@pytest.mark.parametrize("shape", [(1, 1, 128), (1, 2, 500), (3, 2, 76)], ids=str)
def test_tiles_are_those_of_a_group_per_model(shape):
    models, rows = shape[0], shape[1] * shape[2]
    got = mosaic_gpu._plan(np.zeros((*shape, 1)))
    tiles, used = plan_tiles(np.full(models, rows), models * rows)
    np.testing.assert_array_equal(got[1], used)
    np.testing.assert_array_equal(got[0], tiles[: int(used[0])])


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels on a CPU, one at a time: two in one program can wait for each other's threads."""
    monkeypatch.setattr(tiles_mosaic_gpu, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "CONFIG", TileConfig(columns=128, stages=2))
    for name in ("swiglu_rows", "swiglu_gradients"):
        kernel = getattr(mosaic_gpu, name)
        blocking = lambda *args, kernel=kernel, **settings: jax.block_until_ready(kernel(*args, **settings))
        monkeypatch.setattr(mosaic_gpu, name, blocking)
    with plgpu.force_gpu_interpret_mode():
        yield


KERNELS = run(mosaic_gpu.swiglu_product, mosaic_gpu.swiglu_product_gradient)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter(interpreted):
    arrays = draw((2, 76), 128, 192, "bfloat16")
    check(KERNELS(*arrays), exact(*arrays), "bfloat16")


def test_every_shape_lowers_for_cuda():
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw((2, 128), 128, 192, "bfloat16", (3,))]
    text = jax.jit(jax.vmap(KERNELS)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2  # one launch each for all models


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("widths", [(256, 384), (1024, 512), (192, 2816)], ids=str)
def test_the_kernels_on_the_card(widths, dtype):
    for rows in ((1, 128), (2, 1000), (4, 512)):
        arrays = draw(rows, *widths, dtype)
        results = [jax.jit(KERNELS)(*arrays) for _ in range(2)]
        check(results[0], exact(*arrays), dtype)
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
def test_several_models_on_the_card():
    arrays = draw((2, 300), 128, 192, "bfloat16", (3,))
    got = jax.jit(jax.vmap(KERNELS))(*arrays)
    for i in range(3):
        check([a[i] for a in got], exact(*(a[i] for a in arrays)), "bfloat16")
