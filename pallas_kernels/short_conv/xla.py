"""Short convolution as W shifted multiply-adds in plain JAX, with a hand-written backward; any device."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.segments import segment_starts

CPU_BLOCK = 32  # tokens added at a time


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    cache: Float[Array, "B W-1 D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """See `pallas_kernels.short_conv.api.short_conv`.

    Padding between tokens that see each other is moved to the end of its row first, and back afterwards. Rows without
    such padding, which is what packed documents and left- or right-padded batches are, skip both moves at run time.
    """
    (B, T, D), W = x.shape, weight.shape[1]
    history = jnp.zeros((B, W - 1, D), x.dtype) if cache is None else cache.astype(x.dtype)
    if segment_ids is None:
        padded = jnp.concatenate([history, x], axis=1)
        return convolve(padded, weight, None), padded[:, T:]
    valid, starts = segment_ids != 0, segment_starts(segment_ids)
    x = jnp.where(valid[..., None], x, 0)
    holes = _has_holes(valid, starts, cache is not None)
    order = lax.cond(holes, lambda: jnp.argsort(~valid, axis=1, stable=True), lambda: _positions(valid.shape))
    back = lax.cond(holes, lambda: jnp.argsort(order, axis=1), lambda: order)
    x = lax.cond(holes, lambda: _permute(x, order, back), lambda: x)
    reach = _reach(jnp.take_along_axis(starts, order, axis=1), W)
    padded = jnp.concatenate([history, x], axis=1)
    y = convolve(padded, weight, reach)
    y = lax.cond(holes, lambda: _permute(y, back, order), lambda: y)
    still_valid = jnp.take_along_axis(valid, order, axis=1)
    return jnp.where(valid[..., None], y, 0), _last_inputs(padded, still_valid, reach, W)


def _positions(shape: tuple[int, int]) -> Int[Array, "B T"]:
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def _has_holes(valid: Bool[Array, "B T"], starts: Bool[Array, "B T"], has_cache: bool) -> Bool[Array, ""]:
    """Whether padding stands between two tokens of one document, or between the cache and the first token."""
    after_padding = valid[:, 1:] & ~valid[:, :-1] & ~starts[:, 1:]
    seen = jnp.cumsum(valid[:, :-1], axis=1) > 0
    if has_cache:
        return jnp.any(after_padding) | jnp.any(~valid[:, 0])
    return jnp.any(after_padding & seen)


def _reach(starts: Bool[Array, "B T"], W: int) -> Int[Array, "B T"]:
    """How many tokens back the taps of each token may look: to its document's start, or into the history."""
    position = _positions(starts.shape)
    first = lax.cummax(jnp.where(starts, position, 1 - W), axis=1)
    return position - first


def _last_inputs(
    padded: Float[Array, "B T+W-1 D"], valid: Bool[Array, "B T"], reach: Int[Array, "B T"], W: int
) -> Float[Array, "B W-1 D"]:
    """The W-1 inputs before the first token to come, zero where its document is younger than that."""
    position = _positions(valid.shape)
    last = jnp.max(jnp.where(valid, position, -1), axis=1, keepdims=True)
    age = jnp.take_along_axis(reach, jnp.maximum(last, 0), axis=1)
    back = jnp.arange(W - 2, -1, -1, dtype=jnp.int32)[None]  # tokens before the last one
    inputs = jnp.take_along_axis(padded, (last + W - 1 - back)[..., None], axis=1)
    return jnp.where(((back <= age) | (last < 0))[..., None], inputs, 0)


@jax.custom_vjp
def _permute(x: Float[Array, "B T D"], order: Int[Array, "B T"], inverse: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Reorders tokens; the backward is a gather too, where automatic differentiation would scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


_permute.defvjp(
    lambda x, order, inverse: (_permute(x, order, inverse), (order, inverse)),
    lambda saved, dy: (_permute(dy, saved[1], saved[0]), None, None),
)


@jax.custom_vjp
def convolve(
    padded: Float[Array, "B T+W-1 D"], weight: Float[Array, "D W"], reach: Int[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """silu of the convolution; the first W-1 tokens of `padded` are history. The backward keeps only the inputs."""
    return jax.nn.silu(_linear(padded, weight, reach)).astype(padded.dtype)


def _taps(weight: Float[Array, "D W"], dtype) -> list[Float[Array, "1 1 D"]]:
    """Filters by how many tokens back they look."""
    return [weight[None, None, :, d].astype(dtype) for d in reversed(range(weight.shape[1]))]


def _seen(x: Float[Array, "B T D"], reach: Int[Array, "B T"] | None, d: int) -> Float[Array, "B T D"]:
    """x where a token may look d tokens back, else zero."""
    return x if reach is None or d == 0 else jnp.where((reach >= d)[..., None], x, 0)


def _linear(padded, weight, reach) -> Float[Array, "B T D"]:
    dtype, W = jnp.promote_types(padded.dtype, jnp.float32), weight.shape[1]
    T = padded.shape[1] - W + 1
    shifted = (padded[:, W - 1 - d : W - 1 - d + T].astype(dtype) for d in range(W))
    return sum(tap * _seen(x, reach, d) for d, (tap, x) in enumerate(zip(_taps(weight, dtype), shifted, strict=True)))


def _convolve_forward(padded, weight, reach):
    return convolve(padded, weight, reach), (padded, weight, reach)


def _convolve_backward(saved, dy):
    padded, weight, reach = saved
    linear, through_silu = jax.vjp(jax.nn.silu, _linear(padded, weight, reach))
    (d_linear,) = through_silu(dy.astype(linear.dtype))
    d_taps = lax.platform_dependent(padded, d_linear, reach, cpu=_tap_gradients_cpu, default=_tap_gradients)
    d_weight = jnp.moveaxis(d_taps[::-1], 0, 1)
    return _input_gradient(d_linear, weight, reach).astype(padded.dtype), d_weight.astype(weight.dtype), None


def _input_gradient(d_linear, weight, reach) -> Float[Array, "B T+W-1 D"]:
    """Each input collects from the W tokens that read it."""
    W = weight.shape[1]
    length, around = d_linear.shape[1] + W - 1, (W - 1, W - 1)
    readers = jnp.pad(d_linear, ((0, 0), around, (0, 0)))
    reach = None if reach is None else jnp.pad(reach, ((0, 0), around))
    total = 0
    for d, tap in enumerate(_taps(weight, d_linear.dtype)):
        at = slice(d, d + length)
        total += tap * _seen(readers[:, at], None if reach is None else reach[:, at], d)
    return total


def _tap_products(padded, d_linear, reach) -> list[Float[Array, "B T D"]]:
    """What each token adds to the gradient of each tap, by how many tokens back the tap looks."""
    T = d_linear.shape[1]
    W = padded.shape[1] - T + 1
    shifted = (padded[:, W - 1 - d : W - 1 - d + T].astype(d_linear.dtype) for d in range(W))
    return [x * _seen(d_linear, reach, d) for d, x in enumerate(shifted)]


def _tap_gradients(padded, d_linear, reach) -> Float[Array, "W D"]:
    return jnp.stack([jnp.sum(x, axis=(0, 1)) for x in _tap_products(padded, d_linear, reach)])


def _tap_gradients_cpu(padded, d_linear, reach) -> Float[Array, "W D"]:
    """The same sums by adding blocks of tokens: XLA's CPU reductions over leading axes take ten times as long."""
    B, T, D = d_linear.shape
    history = padded.shape[1] - T
    if tail := -T % CPU_BLOCK:
        padded, d_linear = (jnp.pad(x, ((0, 0), (0, tail), (0, 0))) for x in (padded, d_linear))
        reach = None if reach is None else jnp.pad(reach, ((0, 0), (0, tail)))

    def block(n, sums):
        at = n * CPU_BLOCK
        x = lax.dynamic_slice_in_dim(padded, at, CPU_BLOCK + history, axis=1)
        dy = lax.dynamic_slice_in_dim(d_linear, at, CPU_BLOCK, axis=1)
        back = None if reach is None else lax.dynamic_slice_in_dim(reach, at, CPU_BLOCK, axis=1)
        return [total + product for total, product in zip(sums, _tap_products(x, dy, back), strict=True)]

    zeros = [jnp.zeros((B, CPU_BLOCK, D), d_linear.dtype)] * (history + 1)
    return jnp.stack([jnp.sum(x, axis=(0, 1)) for x in lax.fori_loop(0, (T + tail) // CPU_BLOCK, block, zeros)])


convolve.defvjp(_convolve_forward, _convolve_backward)
