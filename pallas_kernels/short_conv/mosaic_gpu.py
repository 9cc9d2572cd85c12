"""Short convolution on Hopper: every input is read once and every result written once, a window of tokens in registers.

Rows of tokens are addressed through an order that has padding last, so that a window is always the tokens before.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import refuse_device
from pallas_kernels.segments import segment_starts
from pallas_kernels.short_conv import xla

f32, i32 = jnp.float32, jnp.int32
LOG2E = math.log2(math.e)
DTYPES = (jnp.bfloat16, jnp.float16)
THREADS = 128
VECTORS = (4, 2, 1)  # channels per thread, the widest first
GRADIENT_VECTORS = (2, 1)  # wider ones take registers from other blocks: 15 % slower
GROUP, GRADIENT_GROUP = 8, 4  # tokens whose loads are in flight together
TOKENS = 64  # per block
WIDEST = 4  # taps: what fits in registers


def refuse(x, weight, **_) -> str | None:
    """Refuses all but Hopper GPUs, and shapes that whole groups of threads and tokens do not cover."""
    return refuse_device() or unserved(x, weight)


def unserved(x, weight) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    (_, T, D), W = x.shape, weight.shape[1]
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if T % GROUP or D % THREADS or not 1 < W <= WIDEST:
        return f"{T=}, {D=}, {W=}: T must be a multiple of {GROUP}, D of {THREADS}, W 2 to {WIDEST}"
    return None


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    cache: Float[Array, "B W-1 D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """See `pallas_kernels.short_conv.api.short_conv`."""
    W = weight.shape[1]
    history = None if cache is None else cache.astype(x.dtype)
    order = reach = None
    if segment_ids is not None:
        order, reach = compact(segment_ids, W)
    taps = jnp.broadcast_to(weight.astype(f32).T, (x.shape[0], W, x.shape[2]))  # per row: several models have several
    y = convolve(x, taps, history, order, reach)
    return y, last_inputs(x, history, order, reach, W)


def compact(segment_ids: Int[Array, "B T"], W: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Moves padding to the end of its row.

    Returns:
      (the token at each place; how many places back its taps look: to its document's start or into the history, at most
      W - 1, and -1 for padding).
    """
    valid, starts = segment_ids != 0, segment_starts(segment_ids)
    position = lax.broadcasted_iota(i32, segment_ids.shape, 1)
    count = jnp.cumsum(valid, axis=1, dtype=i32)
    place = jnp.where(valid, count - 1, count[:, -1:] + position - count)
    first = lax.cummax(jnp.where(starts, count - 1, 1 - W), axis=1)  # place at which the document starts
    reach = jnp.where(valid, jnp.minimum(count - 1 - first, W - 1), -1)
    row = lax.broadcasted_iota(i32, place.shape, 0)
    put = functools.partial(jnp.zeros_like(place).at[row, place].set, unique_indices=True)
    return put(position), put(reach)


def last_inputs(x, history, order, reach, W: int) -> Float[Array, "B W-1 D"]:
    """The W-1 inputs before the first token to come, zero where its document is younger than that."""
    B, T, D = x.shape
    history = jnp.zeros((B, W - 1, D), x.dtype) if history is None else history
    if order is None:
        return jnp.concatenate([history, x[:, max(T - W + 1, 0) :]], axis=1)[:, 1 - W :]
    count = jnp.sum(reach >= 0, axis=1, keepdims=True)
    back = jnp.arange(W - 2, -1, -1, dtype=i32)[None]
    place = count - 1 - back
    age = jnp.take_along_axis(reach, jnp.maximum(count - 1, 0), axis=1)
    tokens = jnp.take_along_axis(order, jnp.maximum(place, 0), axis=1)
    inputs = jnp.take_along_axis(x, tokens[..., None], axis=1)
    before = jnp.take_along_axis(history, jnp.clip(place + W - 1, 0, W - 2)[..., None], axis=1)
    inputs = jnp.where((place >= 0)[..., None], inputs, before)
    return jnp.where(((back <= age) | (count == 0))[..., None], inputs, 0)


@jax.custom_vjp
def convolve(
    x: Float[Array, "B T D"],
    taps: Float[Array, "B W D"],
    history: Float[Array, "B W-1 D"] | None,
    order: Int[Array, "B T"] | None,
    reach: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """silu of the convolution, zero at padding; `order`, `reach` as from `compact`, None: no padding, one document."""
    return by_rows(_convolve)(x, taps, history, order, reach)


def _convolve(x, taps, history, order, reach):
    (_, T, D), W = x.shape, taps.shape[1]
    vector = _widest(VECTORS, D)
    carried, packed = history is not None, order is not None

    def short_conv_forward(x, taps, *refs):
        *refs, y = refs
        history = refs[0] if carried else None
        order, reach = refs[-2:] if packed else (None, None)
        b, first, channels, load = _place(vector)
        weights = [load(taps.at[b, d, channels]) for d in range(W)]

        def before(d):  # the input d places before the block
            place = first - d
            token = jnp.maximum(place, 0)
            row = load(x.at[b, order[b, token] if packed else token, channels])
            old = load(history.at[b, jnp.minimum(place + W - 1, W - 2), channels]) if carried else jnp.zeros_like(row)
            return _where(place >= 0, row, old)

        def group(n, window):
            places = [first + n * GROUP + u for u in range(GROUP)]
            tokens = [order[b, place] if packed else place for place in places]
            rows = [load(x.at[b, token, channels]) for token in tokens]
            for place, token, row in zip(places, tokens, rows, strict=True):
                inputs = [row, *window]
                linear = _linear(weights, _seen(inputs, reach[b, place] if packed else None))
                y.at[b, token, channels][...] = (linear * _sigmoid(linear)).astype(y.dtype)
                window = inputs[: W - 1]
            return window

        groups = lax.div(jnp.minimum(T - first, TOKENS), GROUP)
        lax.fori_loop(0, groups, group, [before(d) for d in range(1, W)])

    given = [z for z in (history, order, reach) if z is not None]
    return _launch(short_conv_forward, jax.ShapeDtypeStruct(x.shape, x.dtype), x.shape, vector)(x, taps, *given)


def _convolve_forward(x, taps, history, order, reach):
    return convolve(x, taps, history, order, reach), (x, taps, history, order, reach)


def _convolve_backward(saved, dy):
    x, taps, history, order, reach = saved
    if history is None:
        return *gradients(x, taps, dy, order, reach), None, None, None
    (B, _, _), before = x.shape, history.shape[1]
    row, place = (lax.broadcasted_iota(i32, (B, before), axis) for axis in (0, 1))
    head = row, place if order is None else order[:, :before]  # the tokens that may see the history: plain JAX
    near = None if reach is None else reach[:, :before]
    x_head, dy_head = (z[head] if near is None else jnp.where((near >= 0)[..., None], z[head], 0) for z in (x, dy))
    convolve_head = lambda padded, taps: jax.vmap(_convolve_row)(padded, taps, near)
    d_padded, d_head = jax.vjp(convolve_head, jnp.concatenate([history, x_head], axis=1), taps)[1](dy_head)
    dx, d_taps = gradients(x, taps, dy.at[head].set(0), order, reach)
    return dx.at[head].add(d_padded[:, before:]), d_taps + d_head, d_padded[:, :before], None, None


convolve.defvjp(_convolve_forward, _convolve_backward)


def _convolve_row(padded, taps, reach):
    return xla.convolve(padded[None], taps.T, reach=None if reach is None else reach[None])[0]


def gradients(x, taps, dy, order, reach) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
    """(dx, d taps) of `convolve` without a history."""
    return by_rows(_gradients)(x, taps, dy, order, reach)


def _gradients(x, taps, dy, order, reach):
    (B, T, D), W = x.shape, taps.shape[1]
    vector, packed = _widest(GRADIENT_VECTORS, D), order is not None

    def short_conv_backward(x, taps, dy, *refs):
        *refs, dx, d_taps = refs
        order, reach = refs if packed else (None, None)
        b, first, channels, load = _place(vector)
        weights = [load(taps.at[b, d, channels]) for d in range(W)]
        end = jnp.minimum(first + TOKENS, T)

        def locate(place):
            place = jnp.clip(place, 0, T - 1)
            return order[b, place] if packed else place

        def before(d):
            row = load(x.at[b, locate(first - d), channels])
            return _where(first >= d, row)

        def token(place, row, slope, window, pending, sums):
            """Adds what a token passes back to itself and the tokens before it, `pending`; then the oldest is done."""
            inputs = [row, *window]
            back = reach[b, jnp.minimum(place, T - 1)] if packed else None
            seen = _seen(inputs, back)
            linear = _linear(weights, seen)
            gate = _sigmoid(linear)
            d_linear = slope * gate * (1.0 + linear * (1.0 - gate))
            if packed:
                d_linear = _where(back >= 0, d_linear)
            if sums is None:
                d_linear = _where(place < T, d_linear)
            else:
                sums = [total + z * d_linear for total, z in zip(sums, seen, strict=True)]
            passed = _seen([weight * d_linear for weight in reversed(weights)], back)
            pending = [a + z for a, z in zip([jnp.zeros_like(row), *pending], passed, strict=True)]
            oldest = place - W + 1

            @pl.when(oldest >= first)
            def _():
                dx.at[b, locate(oldest), channels][...] = pending[-1].astype(dx.dtype)

            return inputs[: W - 1], pending[: W - 1], sums

        def some(place, number, window, pending, sums):
            tokens = [locate(place + u) for u in range(number)]
            rows = [load(x.at[b, at, channels]) for at in tokens]
            slopes = [load(dy.at[b, at, channels]) for at in tokens]
            for u in range(number):
                window, pending, sums = token(place + u, rows[u], slopes[u], window, pending, sums)
            return window, pending, sums

        def group(n, carry):
            return some(first + n * GRADIENT_GROUP, GRADIENT_GROUP, *carry)

        window = [before(d) for d in range(1, W)]
        zeros = [jnp.zeros_like(window[0])] * W
        groups = lax.div(end - first, GRADIENT_GROUP)
        window, pending, sums = lax.fori_loop(0, groups, group, (window, zeros[1:], zeros))
        some(end, W - 1, window, pending, None)
        for d in range(W):
            d_taps.at[b, lax.axis_index("block"), W - 1 - d, channels][...] = sums[d]

    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((B, pl.cdiv(T, TOKENS), W, D), f32)]
    dx, d_taps = _launch(short_conv_backward, outs, x.shape, vector)(x, taps, dy, *([order, reach] if packed else []))
    return dx, jnp.sum(d_taps, axis=1)


def _widest(vectors: tuple[int, ...], D: int) -> int:
    return next(v for v in vectors if D % (THREADS * v) == 0)


def _place(vector: int):
    """(row of the batch, first token, channels) of this block, and how it loads its channels of a token, in float32."""
    width = THREADS * vector
    layout = plgpu.Layout.WG_STRIDED((width,), vector)
    load = lambda ref: plgpu.load(ref, layout=layout, optimized=False).astype(f32)
    channels = pl.ds(lax.axis_index("channels") * width, width)
    return lax.axis_index("row"), lax.axis_index("block") * TOKENS, channels, load


def _launch(kernel, out_type, shape: tuple[int, int, int], vector: int):
    B, T, D = shape
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(B, pl.cdiv(T, TOKENS), D // (THREADS * vector)),
        grid_names=("row", "block", "channels"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


def _where(condition, x, otherwise=None):
    """One condition for a whole vector."""
    return jnp.where(jnp.broadcast_to(condition, x.shape), x, jnp.zeros_like(x) if otherwise is None else otherwise)


def _seen(values, back):
    """`values` by how many places back they belong, zero beyond `back` and all of them at padding; None: no limit."""
    if back is None:
        return values
    return [_where(back >= d, x) for d, x in enumerate(values)]


def _linear(weights, inputs):
    """Tap W-1 multiplies the token itself."""
    return sum(weight * x for weight, x in zip(reversed(weights), inputs, strict=True))


def _sigmoid(x):
    root = lax.rsqrt(1.0 + jnp.exp2(-LOG2E * x))  # 1 / (1 + e) as a square: no division
    return root * root
