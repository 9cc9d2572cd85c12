"""Rows to the order of their groups and back: against a sort, against each other, and the kernel in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import rows_mosaic_gpu
from pallas_kernels.grouped_matmul.api import place_rows, spread_numbers, spread_rows, sum_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")
T, K, E, D = 40, 3, 5, 256


def draw_groups(tokens=T):
    """Some tokens name a group twice, some name none, which is number E."""
    return np.random.default_rng(0).integers(0, E + 1, (tokens, K)).astype(np.int32)


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def test_places_are_those_of_a_stable_sort():
    group = draw_groups()
    row, sizes = jax.jit(place_rows, static_argnums=1)(group, E)
    np.testing.assert_array_equal(np.asarray(row).ravel()[np.argsort(group.ravel(), kind="stable")], np.arange(T * K))
    np.testing.assert_array_equal(sizes, np.bincount(group.ravel(), minlength=E + 1)[:E])


def test_numbers_go_to_their_places_and_their_gradients_come_back():
    row, _ = place_rows(draw_groups(), E)
    weight, d = draw(T, K), draw(T * K)
    spread, pull = jax.vjp(lambda weight: spread_numbers(weight, row), weight)
    np.testing.assert_array_equal(spread[row], weight)
    np.testing.assert_array_equal(pull(d)[0], d[row])


def test_rows_go_to_their_places_and_their_sum_comes_back():
    row, _ = place_rows(draw_groups(), E)
    x, y = draw(T, D), draw(T * K, D)
    spread, pull = jax.vjp(lambda x: spread_rows(x, row, "xla"), x)
    total, pull_total = jax.vjp(lambda y: sum_rows(y, row, "xla"), y)
    for k in range(K):
        np.testing.assert_array_equal(spread[row[:, k]], x)
    np.testing.assert_allclose(total, np.asarray(y)[np.asarray(row)].sum(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(pull(y)[0], total)  # each is the other's gradient
    np.testing.assert_array_equal(pull_total(x)[0], spread)


def test_rows_beyond_the_result_are_left_out_of_values_and_sums():
    row, _ = place_rows(draw_groups(), E)
    most = T * K // 2
    spread, pull = jax.vjp(lambda x: spread_rows(x, row, "xla", most), draw(T, D))
    np.testing.assert_array_equal(spread, spread_rows(draw(T, D), row, "xla")[:most])
    y = draw(most, D)
    padded = np.concatenate([y, np.zeros((T * K - most, D), np.float32)])
    np.testing.assert_allclose(pull(y)[0], padded[np.asarray(row)].sum(1), rtol=1e-6, atol=1e-6)


def test_sums_are_rounded_once():
    y = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)  # one after the other in bfloat16: 256
    assert sum_rows(y, jnp.arange(3)[None], "xla").item() == 258


@pytest.mark.parametrize("columns", [D, 320])
def test_the_kernel_in_the_interpreter(columns, monkeypatch):
    monkeypatch.setattr(rows_mosaic_gpu, "BLOCKS", 2)
    monkeypatch.setattr(rows_mosaic_gpu, "STAGES", 2)
    row, _ = place_rows(draw_groups(), E)
    x = draw(T, columns, dtype="bfloat16")
    with plgpu.force_gpu_interpret_mode():
        got = rows_mosaic_gpu.spread_rows(x, row, row.size)
    np.testing.assert_array_equal(got, spread_rows(x, row, "xla"))


@pytest.mark.parametrize("columns", [1216, 2304])
def test_the_kernel_lowers_for_cuda(columns):
    x, row = jax.ShapeDtypeStruct((64, columns), jnp.bfloat16), jax.ShapeDtypeStruct((64, 8), jnp.int32)
    jax.jit(rows_mosaic_gpu.spread_rows, static_argnums=2).trace(x, row, 512).lower(lowering_platforms=("cuda",))


def test_the_kernel_says_what_it_does_not_serve():
    assert "got float32" in rows_mosaic_gpu.unserved(jnp.zeros((8, 128)))
    assert "multiple of 8 rows" in rows_mosaic_gpu.unserved(jnp.zeros((9, 128), jnp.bfloat16))
    assert "of 64 columns" in rows_mosaic_gpu.unserved(jnp.zeros((8, 96), jnp.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [128, 1024, 1216, 2304])
def test_the_kernel_on_the_card(columns):
    row, _ = place_rows(draw_groups(4096), E)
    x = draw(4096, columns, dtype="bfloat16")
    run = jax.jit(spread_rows, static_argnums=2)
    np.testing.assert_array_equal(run(x, row, "mosaic_gpu"), run(x, row, "xla"))


@pytest.mark.gpu
def test_rows_beyond_the_result_are_dropped_on_the_card():
    row, _ = place_rows(draw_groups(4096), E)
    x = draw(4096, 1024, dtype="bfloat16")
    run = jax.jit(spread_rows, static_argnums=(2, 3))
    got, want = (run(x, row, name, row.size // 2) for name in ("mosaic_gpu", "xla"))
    np.testing.assert_array_equal(got, want)
