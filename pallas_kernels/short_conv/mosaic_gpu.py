"""Short convolution on Hopper: every input is read once and every result written once, a window of tokens in registers.

Tiles of tokens come through shared memory, several ahead of the one in work, and results leave from where inputs stood.
Packed rows are addressed token by token, through an order that has padding last: a window is always the tokens before.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

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
VECTORS = (2, 1)  # channels per thread, the widest first: a tile has at most 256
PACKED_VECTORS = (4, 2, 1)  # of the forward kernel without tiles
GROUP = 8  # tokens of a tile, or those whose loads are in flight together
PACKED_GROUP = 4  # tokens of the backward kernel without tiles: more of them take registers from other blocks
TILES = 4  # of each array in shared memory, at least 2
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
    carried, packed = history is not None, order is not None
    vector = _widest(PACKED_VECTORS if packed else VECTORS, widths)

    def short_conv_forward(x, taps, *refs):
        refs, outputs, scratch = _split(refs, len(refs) - len(widths) - 2 * (not packed), len(widths))
        history = refs[0] if carried else None
        order, reach = refs[-2:] if packed else (None, None)
        b, first, channels, load = _place(vector, TOKENS)
        weights = [LOG2E * load(taps.at[b, d, channels]) for d in range(W)]
        groups = lax.div(jnp.minimum(T - first, TOKENS), GROUP)
        part = functools.partial(_in_part, outputs, widths, vector)

        def before(d):  # the input d places before the block
            place = first - d
            token = jnp.maximum(place, 0)
            row = load(x.at[b, order[b, token] if packed else token, channels])
            old = load(history.at[b, jnp.minimum(place + W - 1, W - 2), channels]) if carried else jnp.zeros_like(row)
            return _where(place >= 0, row, old).astype(f32)

        def convolved(rows, backs, window):
            results = []
            for row, back in zip(rows, backs, strict=True):
                inputs = [row.astype(f32), *window]
                linear = _linear(weights, _seen(inputs, back))
                results.append((linear * _sigmoid(linear) / LOG2E).astype(row.dtype))
                window = inputs[: W - 1]
            return results, window

        def packed_group(n, window):
            places = [first + n * GROUP + u for u in range(GROUP)]
            tokens = [order[b, place] for place in places]
            rows = [load(x.at[b, token, channels]) for token in tokens]
            results, window = convolved(rows, [reach[b, place] for place in places], window)

            def write(y, channels):
                for token, result in zip(tokens, results, strict=True):
                    y.at[b, token, channels][...] = result

            part(write)
            return window

        def group(n, window):
            (rows,), put = ring.take(n, load)
            results, window = convolved(rows, [None] * GROUP, window)
            put(results, lambda tile: part(lambda y, channels: plgpu.copy_smem_to_gmem(tile, y.at[b, at(n), channels])))
            return window

        at = lambda n: pl.ds(first + n * GROUP, GROUP)
        if not packed:
            ring = _Ring(*scratch, groups, [lambda n, fetch: fetch(x.at[b, at(n), channels])])
        lax.fori_loop(0, groups, packed_group if packed else group, [before(d) for d in range(1, W)])
        if not packed:
            plgpu.wait_smem_to_gmem(0)

    given = [z for z in (history, order, reach) if z is not None]
    outs = [jax.ShapeDtypeStruct((B, T, width), x.dtype) for width in widths]
    scratch = [] if packed else _ring_memory(1, vector, x.dtype)
    return _launch(short_conv_forward, outs, x.shape, vector, TOKENS, scratch)(x, taps, *given)


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
    vector, packed = _widest(VECTORS, widths), order is not None

    def short_conv_backward(x, taps, *refs):
        dys, refs, (dx, d_taps), scratch = _split(refs, len(widths), 2 * packed, 2)
        order, reach = refs if packed else (None, None)
        b, first, channels, load = _place(vector, GRADIENT_TOKENS)
        weights = [LOG2E * load(taps.at[b, d, channels]) for d in range(W)]
        size = PACKED_GROUP if packed else GROUP
        groups = lax.div(jnp.minimum(T - first, GRADIENT_TOKENS), size)
        part = functools.partial(_in_part, dys, widths, vector)

        def locate(place):
            place = jnp.clip(place, 0, T - 1)
            return order[b, place] if packed else place

        def reach_of(place):
            return jnp.where(place < T, reach[b, jnp.minimum(place, T - 1)], -1) if packed else None

        def before(d):
            return _where(first >= d, load(x.at[b, locate(first - d), channels]).astype(f32))

        def token(row, slope, back, window, pending, sums):
            """Adds what a token passes back to itself and the tokens before it, `pending`; then the oldest is done."""
            inputs = [row.astype(f32), *window]
            seen = _seen(inputs, back)
            d_linear = slope.astype(f32) * _slope(_linear(weights, seen))
            if back is not None:
                d_linear = _where(back >= 0, d_linear)
            sums = [total + z * d_linear for total, z in zip(sums, seen, strict=True)]
            own, *passed = _seen([weight * d_linear for weight in reversed(weights)], back)
            *pending, done = [own, *(a + z for a, z in zip(pending, passed, strict=True))]
            return done.astype(dx.dtype), inputs[: W - 1], pending, sums

        def some(rows, slopes, backs, carry):
            results = []
            for arguments in zip(rows, slopes, backs, strict=True):
                done, *carry = token(*arguments, *carry)
                results.append(done)
            return results, tuple(carry)

        def addressed(start, number):
            places = [start + u for u in range(number)]
            tokens = [locate(place) for place in places]
            rows = [load(x.at[b, token, channels]) for token in tokens]
            slopes = part(lambda dy, channels: [load(dy.at[b, token, channels]) for token in tokens])
            return rows, slopes, [reach_of(place) for place in places]

        def packed_group(n, carry):
            start = first + n * PACKED_GROUP
            rows, slopes, backs = addressed(start + W - 1, PACKED_GROUP)
            unlimited = functools.partial(some, rows, slopes, [None] * PACKED_GROUP)
            limited = functools.partial(some, rows, slopes, backs)
            inside = functools.reduce(jnp.minimum, backs) >= W - 1  # of one document
            results, carry = lax.cond(inside, unlimited, limited, carry)
            for u, result in enumerate(results):
                dx.at[b, locate(start + u), channels][...] = result
            return carry

        def group(n, carry):
            (rows, slopes), put = ring.take(n, load)
            results, carry = some(rows, slopes, [None] * GROUP, carry)
            done = pl.ds(first + n * GROUP, GROUP)
            put(results, lambda tile: plgpu.copy_smem_to_gmem(tile, dx.at[b, done, channels]))
            return carry

        # The last W - 1 tokens are those after the block: their sums are this block's, and their tile is zero behind T.
        at = lambda n: pl.ds(first + W - 1 + n * GROUP, GROUP)
        if not packed:
            inputs = lambda n, fetch: fetch(x.at[b, at(n), channels])
            slopes = lambda n, fetch: part(lambda dy, channels: fetch(dy.at[b, at(n), channels]))
            ring = _Ring(*scratch, groups, [inputs, slopes])
        window = [before(d) for d in range(1, W)]
        zeros = [jnp.zeros_like(window[0])] * W
        _, (window, pending, sums) = some(*addressed(first, W - 1), (window, zeros[1:], zeros))
        sums = [_where(first == 0, total) for total in sums]
        carry = lax.fori_loop(0, groups, packed_group if packed else group, (window, pending, sums))
        for d, total in enumerate(carry[-1]):
            d_taps.at[b, lax.axis_index("block"), W - 1 - d, channels][...] = LOG2E * total
        if not packed:
            plgpu.wait_smem_to_gmem(0)

    sums = jax.ShapeDtypeStruct((B, pl.cdiv(T, GRADIENT_TOKENS), W, D), f32)
    scratch = [] if packed else _ring_memory(2, vector, x.dtype)
    launch = _launch(short_conv_backward, [x, sums], x.shape, vector, GRADIENT_TOKENS, scratch)
    dx, d_taps = launch(x, taps, *dys, *([order, reach] if packed else []))
    return dx, jnp.sum(d_taps, axis=1)


class _Ring:
    """Tiles of GROUP tokens in shared memory, fetched ahead of their turn; results go out from where inputs stood."""

    def __init__(self, tiles, loaded, groups, sources: Sequence[Callable]):
        """`sources`: of each array, what calls a function with the tile of a group, which is then fetched."""
        self.tiles, self.loaded, self.groups, self.sources = tiles, loaded, groups, sources
        for n in range(TILES):
            pl.when(n < groups)(functools.partial(self._fetch, n))

    def _fetch(self, n):
        slot = lax.rem(n, TILES)
        for i, source in enumerate(self.sources):
            source(n, lambda tile, i=i: plgpu.copy_gmem_to_smem(tile, self.tiles.at[i, slot], self.loaded.at[slot]))

    def take(self, n, load: Callable):
        """(tokens of group n in each array, what takes their results and a function that copies their tile out)."""
        slot = lax.rem(n, TILES)
        plgpu.barrier_wait(self.loaded.at[slot])
        tokens = [[load(self.tiles.at[i, slot, u]) for u in range(GROUP)] for i in range(len(self.sources))]

        def put(results, copy):
            for u, result in enumerate(results):
                self.tiles.at[0, slot, u][...] = result
            plgpu.commit_smem()
            copy(self.tiles.at[0, slot])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # so that the tile before is free
            pl.when((n > 0) & (n - 1 + TILES < self.groups))(lambda: self._fetch(n - 1 + TILES))

        return tokens, put


def _ring_memory(arrays: int, vector: int, dtype) -> list:
    tiles = plgpu.SMEM((arrays, TILES, GROUP, THREADS * vector), dtype)
    return [tiles, plgpu.Barrier(num_arrivals=arrays, num_barriers=TILES)]


def _split(refs, *numbers: int) -> list:
    """So many refs each, and then the rest."""
    ends = [0, *itertools.accumulate(numbers), len(refs)]
    return [refs[begin:end] for begin, end in itertools.pairwise(ends)]


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


def _launch(kernel, out_type, shape: tuple[int, int, int], vector: int, tokens: int, scratch: list):
    B, T, D = shape
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(B, pl.cdiv(T, tokens), D // (THREADS * vector)),
        grid_names=("row", "block", "channels"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,  # no thread reads what another writes
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
