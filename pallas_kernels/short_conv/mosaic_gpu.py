"""Short convolution on Hopper: every input is read once and every result written once, a window of tokens in registers.

Rows of tokens are addressed through an order that has padding last, so that a window is always the tokens before.
"""

import functools
import itertools
import math
from collections.abc import Callable

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
GRADIENT_VECTORS = (2, 1)  # wider ones take registers from other blocks
GROUP = 8  # tokens whose loads are in flight together
TOKENS, GRADIENT_TOKENS = 64, 128  # per block
WIDEST = 4  # taps: what fits in registers


def refuse(x, weight, *, cuts=(), **_) -> str | None:
    """Refuses all but Hopper GPUs, and shapes that whole groups of threads and tokens do not cover."""
    return refuse_device() or unserved(x, weight, cuts)


def unserved(x, weight, cuts: tuple[int, ...] = ()) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    (_, T, D), W, widths = x.shape, weight.shape[1], _widths(x, cuts)
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if T % GROUP or any(D % THREADS for D in widths) or not 1 < W <= WIDEST:
        D = D if len(widths) == 1 else widths
        return f"{T=}, {D=}, {W=}: T must be a multiple of {GROUP}, D of {THREADS}, W 2 to {WIDEST}"
    return None


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    cuts: tuple[int, ...] = (),
    cache: Float[Array, "B W-1 D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B _ _"], ...]:
    """See `pallas_kernels.short_conv.api`; returns the parts that begin at channel 0 and at `cuts`, then the cache."""
    W = weight.shape[1]
    history = None if cache is None else cache.astype(x.dtype)
    order = reach = None
    if segment_ids is not None:
        order, reach = compact(segment_ids, W)
    taps = jnp.broadcast_to(weight.astype(f32).T, (x.shape[0], W, x.shape[2]))  # per row: several models have several
    ys = convolve(_widths(x, cuts), x, taps, history, order, reach)
    return *ys, last_inputs(x, history, order, reach, W)


def _widths(x, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in itertools.pairwise((0, *cuts, x.shape[2])))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    widths: tuple[int, ...],
    x: Float[Array, "B T D"],
    taps: Float[Array, "B W D"],
    history: Float[Array, "B W-1 D"] | None,
    order: Int[Array, "B T"] | None,
    reach: Int[Array, "B T"] | None,
) -> list[Float[Array, "B T _"]]:
    """silu of the convolution, zero at padding, cut into arrays of so many channels.

    `order`, `reach` are as from `compact`; None: no padding, one document.
    """
    return by_rows(functools.partial(_convolve, widths))(x, taps, history, order, reach)


def _convolve(widths, x, taps, history, order, reach):
    (B, T, _), W = x.shape, taps.shape[1]
    vector = _widest(VECTORS, widths)
    carried, packed = history is not None, order is not None

    def short_conv_forward(x, taps, *refs):
        refs, outputs = refs[: -len(widths)], refs[-len(widths) :]
        history = refs[0] if carried else None
        order, reach = refs[-2:] if packed else (None, None)
        b, first, channels, load = _place(vector, TOKENS)
        weights = [LOG2E * load(taps.at[b, d, channels]).astype(f32) for d in range(W)]

        def before(d):  # the input d places before the block
            place = first - d
            token = jnp.maximum(place, 0)
            row = load(x.at[b, order[b, token] if packed else token, channels])
            old = load(history.at[b, jnp.minimum(place + W - 1, W - 2), channels]) if carried else jnp.zeros_like(row)
            return _where(place >= 0, row, old).astype(f32)

        def group(n, window):
            places = [first + n * GROUP + u for u in range(GROUP)]
            tokens = [order[b, place] if packed else place for place in places]
            rows = [load(x.at[b, token, channels]) for token in tokens]
            results = []
            for place, row in zip(places, rows, strict=True):
                inputs = [row.astype(f32), *window]
                linear = _linear(weights, _seen(inputs, reach[b, place] if packed else None))
                results.append((linear * _sigmoid(linear) / LOG2E).astype(row.dtype))
                window = inputs[: W - 1]

            def write(y, channels):
                for token, result in zip(tokens, results, strict=True):
                    y.at[b, token, channels][...] = result

            _in_part(outputs, widths, vector, write)
            return window

        groups = lax.div(jnp.minimum(T - first, TOKENS), GROUP)
        lax.fori_loop(0, groups, group, [before(d) for d in range(1, W)])

    given = [z for z in (history, order, reach) if z is not None]
    outs = [jax.ShapeDtypeStruct((B, T, width), x.dtype) for width in widths]
    return _launch(short_conv_forward, outs, x.shape, vector, TOKENS)(x, taps, *given)


def _convolve_forward(widths, x, taps, history, order, reach):
    return convolve(widths, x, taps, history, order, reach), (x, taps, history, order, reach)


def _convolve_backward(widths, saved, dys):
    x, taps, history, order, reach = saved
    if history is None:
        return *gradients(x, taps, dys, order, reach), None, None, None
    (B, _, _), before = x.shape, history.shape[1]
    row, place = (lax.broadcasted_iota(i32, (B, before), axis) for axis in (0, 1))
    head = row, place if order is None else order[:, :before]  # the tokens that may see the history: plain JAX
    near = None if reach is None else reach[:, :before]
    dy_head = jnp.concatenate([dy[head] for dy in dys], axis=2)
    x_head, dy_head = (z if near is None else jnp.where((near >= 0)[..., None], z, 0) for z in (x[head], dy_head))
    convolve_head = lambda padded, taps: jax.vmap(_convolve_row)(padded, taps, near)
    d_padded, d_head = jax.vjp(convolve_head, jnp.concatenate([history, x_head], axis=1), taps)[1](dy_head)
    dx, d_taps = gradients(x, taps, [dy.at[head].set(0) for dy in dys], order, reach)
    return dx.at[head].add(d_padded[:, before:]), d_taps + d_head, d_padded[:, :before], None, None


convolve.defvjp(_convolve_forward, _convolve_backward)


def _convolve_row(padded, taps, reach):
    return xla.convolve(padded[None], taps.T, reach=None if reach is None else reach[None])[0]


def gradients(x, taps, dys, order, reach) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
    """(dx, d taps) of `convolve` without a history."""
    return by_rows(_gradients)(x, taps, dys, order, reach)


def _gradients(x, taps, dys, order, reach):
    (B, T, D), W = x.shape, taps.shape[1]
    widths = tuple(dy.shape[2] for dy in dys)
    vector, packed = _widest(GRADIENT_VECTORS, widths), order is not None

    def short_conv_backward(x, taps, *refs):
        *refs, dx, d_taps = refs
        dys, (order, reach) = refs[: len(widths)], refs[len(widths) :] if packed else (None, None)
        b, first, channels, load = _place(vector, GRADIENT_TOKENS)
        weights = [LOG2E * load(taps.at[b, d, channels]) for d in range(W)]
        end = jnp.minimum(first + GRADIENT_TOKENS, T)

        def tokens_of(ref, start, number, channels):
            start = jnp.minimum(start, T - number)
            if packed:
                return [ref.at[b, order[b, start + u], channels] for u in range(number)]
            part = ref.at[b, pl.ds(start, number), channels]
            return [part.at[u] for u in range(number)]

        def before(d):
            (row,) = tokens_of(x, jnp.maximum(first - d, 0), 1, channels)
            return _where(first >= d, load(row).astype(f32))

        def token(place, row, slope, window, pending, sums):
            """Adds what a token passes back to itself and the tokens before it, `pending`; then the oldest is done."""
            inputs = [row.astype(f32), *window]
            back = reach[b, jnp.minimum(place, T - 1)] if packed else None
            seen = _seen(inputs, back)
            d_linear = slope.astype(f32) * _slope(_linear(weights, seen))
            if packed:
                d_linear = _where(back >= 0, d_linear)
            if sums is None:
                d_linear = _where(place < T, d_linear)
            else:
                sums = [total + z * d_linear for total, z in zip(sums, seen, strict=True)]
            own, *passed = _seen([weight * d_linear for weight in reversed(weights)], back)
            *pending, done = [own, *(a + z for a, z in zip(pending, passed, strict=True))]
            return inputs[: W - 1], pending, sums, done.astype(dx.dtype)

        def some(start, number, window, pending, sums, skipped=0):
            """Takes so many tokens; the first results are skipped, as those of another block."""
            read = lambda ref, channels: [load(row) for row in tokens_of(ref, start, number, channels)]
            rows, slopes = read(x, channels), _in_part(dys, widths, vector, read)
            targets = tokens_of(dx, start + skipped - W + 1, number - skipped, channels)
            for u in range(number):
                window, pending, sums, done = token(start + u, rows[u], slopes[u], window, pending, sums)
                if u >= skipped:
                    targets[u - skipped][...] = done
            return window, pending, sums

        def group(n, carry):
            return some(first + n * GROUP, GROUP, *carry)

        window = [before(d) for d in range(1, W)]
        zeros = [jnp.zeros_like(window[0])] * W
        carry = some(first, GROUP, window, zeros[1:], zeros, skipped=W - 1)
        window, pending, sums = lax.fori_loop(1, lax.div(end - first, GROUP), group, carry)
        some(end, W - 1, window, pending, None)
        for d in range(W):
            d_taps.at[b, lax.axis_index("block"), W - 1 - d, channels][...] = LOG2E * sums[d]

    sums = jax.ShapeDtypeStruct((B, pl.cdiv(T, GRADIENT_TOKENS), W, D), f32)
    launch = _launch(short_conv_backward, [x, sums], x.shape, vector, GRADIENT_TOKENS)
    dx, d_taps = launch(x, taps, *dys, *([order, reach] if packed else []))
    return dx, jnp.sum(d_taps, axis=1)


def _widest(vectors: tuple[int, ...], widths: tuple[int, ...]) -> int:
    return next(v for v in vectors if not any(width % (THREADS * v) for width in widths))


def _place(vector: int, tokens: int):
    """(row of the batch, first token, channels) of this block, and how it loads its channels of a token."""
    width = THREADS * vector
    layout = plgpu.Layout.WG_STRIDED((width,), vector)
    channels = pl.ds(lax.axis_index("channels") * width, width)
    load = functools.partial(plgpu.load, layout=layout, optimized=False)
    return lax.axis_index("row"), lax.axis_index("block") * tokens, channels, load


def _in_part(refs, widths: tuple[int, ...], vector: int, use: Callable):
    """Calls `use` with the one of the arrays joined along channels that has this block's, and their place in it."""
    begin, ends = lax.axis_index("channels") * (THREADS * vector), list(itertools.accumulate(widths))
    places = [pl.ds(begin - end + width, THREADS * vector) for end, width in zip(ends, widths, strict=True)]
    uses = [functools.partial(use, ref, place) for ref, place in zip(refs, places, strict=True)]
    return lax.switch(sum((begin >= end).astype(i32) for end in ends[:-1]), uses) if len(uses) > 1 else uses[0]()


def _launch(kernel, out_type, shape: tuple[int, int, int], vector: int, tokens: int):
    B, T, D = shape
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(B, pl.cdiv(T, tokens), D // (THREADS * vector)),
        grid_names=("row", "block", "channels"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,  # threads share nothing
            reduction_scratch_bytes=0,
        ),
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
    """Of x / LOG2E: weights are multiplied by that factor once instead of every sum before its exponential."""
    root = lax.rsqrt(1.0 + jnp.exp2(-x))  # 1 / (1 + e) as a square: no division
    return root * root


def _slope(x):
    """The derivative of silu at x / LOG2E, divided by LOG2E; the constants are spread to save a multiplication."""
    gate, unit = _sigmoid(x), 1.0 / LOG2E
    return gate * (x * (unit**2 - unit**2 * gate) + unit)
