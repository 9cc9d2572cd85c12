"""The short convolution: shifted multiply-adds against the token-by-token definition, values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.short_conv import short_conv, short_conv_parts, xla
from pallas_kernels.testing import assert_all_close, assert_close, generator

# Largest error ratio against the definition in float64; measured 9e-8, 3e-4 and 2.3e-3 (half precision: the rounding
# of the results).
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
B, T, D = 5, 23, 6


def _segments() -> dict[str, np.ndarray | None]:
    packed = np.sort(generator(0, "packed").integers(1, 6, (B, T)), axis=1)
    holes = np.zeros((B, T), np.int32)
    holes[0, 3:10], holes[0, 10], holes[0, 11:14], holes[0, 16], holes[0, 18:20] = 1, 2, 1, 1, 1
    holes[1, 1::2] = 1
    holes[2] = generator(0, "holes").integers(0, 3, T)
    holes[4] = 7
    time = np.broadcast_to(np.arange(T), (B, T))
    ids = {"packed": packed, "left": time > 8, "right": time < 9, "middle": (time < 4) | (time > 9), "holes": holes}
    return {"none": None} | {name: x.astype(np.int32) for name, x in ids.items()}


SEGMENTS = _segments()
_conv = jax.jit(short_conv, static_argnames="implementation")


def _inputs(W=4, dtype="float32"):
    def draw(name, *shape):
        return np.asarray(generator(0, name).standard_normal(shape), jnp.dtype(dtype))

    return draw("x", B, T, D), draw("weight", D, W), draw("cache", B, W - 1, D), draw("dy", B, T, D)


@functools.partial(jax.jit, static_argnames="implementation")
def _values_and_gradients(x, weight, cache, dy, segment_ids=None, *, implementation="xla"):
    def values(x, weight, cache):
        return short_conv(x, weight, cache=cache, segment_ids=segment_ids, implementation=implementation)

    (y, last), pull_back = jax.vjp(values, x, weight, cache)
    d_last = jnp.cos(jnp.arange(last.size, dtype=jnp.float32)).reshape(last.shape).astype(last.dtype)
    dx, d_weight, d_cache = pull_back((dy.astype(y.dtype), d_last))
    results = {"y": y, "cache": last, "dx": dx, "dweight": d_weight, "dcache": d_cache}
    return {name: x for name, x in results.items() if x is not None}


def _exact(*arrays, segment_ids):
    with jax.enable_x64(True):
        wide = [None if x is None else x.astype(np.float64) for x in arrays]
        results = _values_and_gradients(*wide, segment_ids, implementation="reference")
        return {name: np.asarray(x) for name, x in results.items()}


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_values_and_gradients(segments, has_cache):
    x, weight, cache, dy = _inputs()
    arrays, ids = (x, weight, cache if has_cache else None, dy), SEGMENTS[segments]
    assert_all_close(_values_and_gradients(*arrays, ids), _exact(*arrays, segment_ids=ids), TOLERANCE["float32"])


@pytest.mark.parametrize("W", [1, 2, 5])
def test_widths(W):
    arrays, ids = _inputs(W), SEGMENTS["holes"]
    assert_all_close(_values_and_gradients(*arrays, ids), _exact(*arrays, segment_ids=ids), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    arrays, ids = _inputs(dtype=dtype), SEGMENTS["packed"]
    got = _values_and_gradients(*arrays, ids)
    assert {x.dtype for x in got.values()} == {jnp.dtype(dtype)}
    assert_all_close(got, _exact(*arrays, segment_ids=ids), TOLERANCE[dtype])


def test_tap_gradients_are_the_same_on_every_platform():
    padded = generator(0, "padded").standard_normal((2, 70 + 3, 5)).astype(np.float32)
    d_linear = generator(0, "d_linear").standard_normal((2, 70, 5)).astype(np.float32)
    for reach in (None, np.broadcast_to(np.arange(70, dtype=np.int32) % 9, (2, 70))):
        got, want = (jax.jit(f)(padded, d_linear, reach) for f in (xla._tap_gradients_cpu, xla._tap_gradients))
        assert_close("dweight", got, want, 1e-6)


def test_parts_are_what_the_whole_returns():
    x, weight, cache, dy = _inputs()
    ids, widths = SEGMENTS["holes"], (1, 3, 2)

    @jax.jit
    def of_parts(x, weight, cache, dy):
        def joined(x, weight, cache):
            ys, last = short_conv_parts(x, weight, widths, cache=cache, segment_ids=ids)
            assert tuple(y.shape[2] for y in ys) == widths
            return jnp.concatenate(ys, axis=2), last

        (y, last), pull_back = jax.vjp(joined, x, weight, cache)
        return y, last, *pull_back((dy, jnp.zeros_like(last)))

    y, last, *gradients = of_parts(x, weight, cache, dy)
    want, pull_back = jax.vjp(lambda *arrays: _conv(*arrays[:2], cache=arrays[2], segment_ids=ids), x, weight, cache)
    for got, expected in zip((y, last, *gradients), (*want, *pull_back((dy, jnp.zeros_like(last)))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)  # measured 0


@pytest.mark.parametrize("widths", [(1, 3), (6, 0), (7, -1)])
def test_widths_that_are_not_those_of_x(widths):
    x, weight, _, _ = _inputs()
    with pytest.raises(ValueError, match="must be positive and add up to 6"):
        short_conv_parts(x, weight, widths)


@pytest.mark.parametrize("at", [1, 2, 11])
def test_halves_with_carried_cache_equal_the_whole(at):
    """Also halves shorter than the filter; values, and gradients that cross the seam through the cache."""
    x, weight, cache, dy = _inputs()
    y, last = _conv(x, weight, cache=cache)
    y_1, middle = _conv(x[:, :at], weight, cache=cache)
    y_2, end = _conv(x[:, at:], weight, cache=middle)
    assert_close("y", jnp.concatenate([y_1, y_2], axis=1), y, TOLERANCE["float32"])
    np.testing.assert_array_equal(end, last)

    def whole(x):
        return jnp.sum(_conv(x, weight)[0] * dy)

    def halves(x):
        y_1, middle = _conv(x[:, :at], weight)
        y_2, _ = _conv(x[:, at:], weight, cache=middle)
        return jnp.sum(jnp.concatenate([y_1, y_2], axis=1) * dy)

    assert_close("dx", jax.grad(halves)(x), jax.grad(whole)(x), TOLERANCE["float32"])


def test_left_padding_changes_nothing():
    x, weight, _, _ = _inputs()
    y, last = _conv(x[:, 9:], weight)
    padded_y, padded_last = _conv(x, weight, segment_ids=SEGMENTS["left"])
    assert_close("y", padded_y[:, 9:], y, TOLERANCE["float32"])
    np.testing.assert_array_equal(padded_last, last)
    assert not padded_y[:, :9].any()


def test_packed_documents_equal_separate_ones():
    x, weight, cache, _ = _inputs()
    ids = np.broadcast_to(np.repeat([3, 1, 2, 3], [9, 1, 2, 11]), (B, T)).astype(np.int32)
    y, last = _conv(x, weight, cache=cache, segment_ids=ids)
    ends, separate = (9, 10, 12, 23), []
    for start, end in zip((0, *ends), ends, strict=False):
        y_document, last_document = _conv(x[:, start:end], weight, cache=None if start else cache)
        separate.append(y_document)
    assert_close("y", y, jnp.concatenate(separate, axis=1), TOLERANCE["float32"])
    np.testing.assert_array_equal(last, last_document)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("segments", ["left", "right", "middle", "holes"])
def test_padding_may_hold_nan(segments, implementation):
    x, weight, cache, dy = _inputs()
    ids = SEGMENTS[segments]
    x, dy = (np.where((ids == 0)[..., None], np.float32(np.nan), a) for a in (x, dy))
    results = _values_and_gradients(x, weight, cache, dy, ids, implementation=implementation)
    assert all(np.isfinite(a).all() for a in results.values())
    assert not np.asarray(results["y"])[ids == 0].any()
    assert not np.asarray(results["dx"])[ids == 0].any()


def test_rows_of_padding_return_the_cache():
    x, weight, cache, _ = _inputs()
    y, last = _conv(x, weight, cache=cache, segment_ids=np.zeros((B, T), np.int32))
    assert not y.any()
    np.testing.assert_array_equal(last, cache)


def test_the_past_does_not_depend_on_the_future():
    x, weight, cache, _ = _inputs()
    changed = x.copy()
    changed[:, 13:] += 1
    before, after = (_conv(a, weight, cache=cache)[0] for a in (x, changed))
    np.testing.assert_array_equal(before[:, :13], after[:, :13])
    assert np.any(before[:, 13:] != after[:, 13:])


def test_vmap_equals_a_loop():
    x, weight, _, _ = _inputs()
    ids = np.stack([SEGMENTS["holes"], SEGMENTS["packed"]])
    got, _ = jax.vmap(lambda ids: _conv(x, weight, segment_ids=ids))(ids)
    for i in range(2):
        np.testing.assert_allclose(got[i], _conv(x, weight, segment_ids=ids[i])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3))}, r"x has shape \(2, 3\), must be \(B, T, D\)"),
        ({"x": np.zeros((2, 0, 4))}, "T=0 must be at least 1"),
        ({"x": np.zeros((2, 3, 4), np.int32)}, "x is int32, must be floating"),
        ({"weight": np.zeros((5, 4))}, r"weight has shape \(5, 4\), must be \(4, 4\)"),
        ({"cache": np.zeros((2, 4, 4))}, r"cache has shape \(2, 4, 4\), must be \(2, 3, 4\)"),
        ({"segment_ids": np.zeros((2, 4), np.int32)}, "segment_ids has shape"),
        ({"segment_ids": np.zeros((2, 3))}, "segment_ids is float64, must be integer"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**({"x": np.zeros((2, 3, 4)), "weight": np.zeros((4, 4))} | change))
