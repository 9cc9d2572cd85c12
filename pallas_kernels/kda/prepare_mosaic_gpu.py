"""KDA on Hopper, first kernel: all of a 64-token chunk that does not depend on the state, chunks in parallel."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.kda import blocks_mosaic_gpu as blocks
from pallas_kernels.kda.gates import Gate, SoftplusGate
from pallas_kernels.kda.reference import L2_EPS

C = 64  # tokens per chunk
HALF = 64  # channels per shared-memory tile of 128-byte rows
LEVELS = 6  # block sizes 1, 2, 4, ..., 32
OWN, FINE = 16, 4  # tokens of one warp; levels inside them, which need no other warp
TEAMS = 2  # warpgroups per block, each on a chunk of its own: 255 registers a thread, 113 KB of shared memory each
LOG2E = math.log2(math.e)
FORGET = -3e4  # log2 of the decay that clears a state: 2**FORGET is exactly 0, and float16 holds it
BEFORE, AFTER, ACROSS = 0, 4, 8  # first rows, of four each, in the table of decays over whole blocks of OWN tokens
SUMS = 12  # first float32 row of the sums that the table is made from, behind it in the same memory
RESET, PADDING = 1, 2  # token codes; 0 is an ordinary token

f32, f16, i32 = jnp.float32, jnp.float16, jnp.int32
ROWS = plgpu.Layout.WGMMA
CHANNELS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # one channel per thread


class _Inputs(NamedTuple):
    """What a chunk is made from, in device memory for all chunks or in shared memory for one."""

    q: jax.Ref
    k: jax.Ref
    g: jax.Ref
    beta: jax.Ref
    bias: jax.Ref
    code: jax.Ref | None


class _Work(NamedTuple):
    """Shared memory of one chunk, from which the results leave; `aqk`, `table` and `sums` share their bytes."""

    kg: jax.Ref
    kr: jax.Ref
    qg: jax.Ref
    t: jax.Ref
    aqk: jax.Ref
    table: jax.Ref
    sums: jax.Ref


class _Options(NamedTuple):
    gate: Gate
    scale: float
    normalize: bool
    halves: int  # of the channels, HALF each
    group: int  # value heads per query head


class Prepared(NamedTuple):
    """The chunk operands, [B * HV, chunks, ...]; G is the running sum of the log2-decay inside the chunk.

    Args:
      kg: k 2^G, float16 [C, K]: reads the state entering the chunk.
      kr: k 2^(G_last - G), float16 [C, K]: writes the state leaving it.
      qg: scale q 2^G, float16 [C, K].
      t: (I + L)^-1 with L_ij = beta_i k_i 2^(G_i - G_j) k_j below the diagonal, float16 [C, C].
      aqk: scale q_i 2^(G_i - G_j) k_j on and below the diagonal, float16 [C, C].
      gamma: 2^G_last, float32 [K].
    """

    kg: Float[Array, "BH N C K"]
    kr: Float[Array, "BH N C K"]
    qg: Float[Array, "BH N C K"]
    t: Float[Array, "BH N C C"]
    aqk: Float[Array, "BH N C C"]
    gamma: Float[Array, "BH N K"]


def tile(*shape, dtype=f16):
    """A shared-memory buffer in the layout of the matrix unit: 128-byte swizzled rows, tiles of 8 rows."""
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


def products(*groups, shape=(C, C)):
    """Independent matrix products in flight together, then one wait.

    Args:
      groups: each a list of (A, B) pairs summed in one float32 accumulator.

    Returns:
      The accumulators in registers, one per group.
    """

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, groups, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        plgpu.wgmma_wait(0)
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(run, *[plgpu.ACC(shape, f32)] * len(groups))


def add_product(start, a, b):
    """start + A B, accumulated in place."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(start))


@plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), i32, None))
def hidden_zero(_):
    """Zero, but not to the compiler: what depends on it is computed where it stands. Addresses and masks that the
    compiler hoists out of the loop over chunks would fill the registers and spill."""
    value = llvm.inline_asm(ir.IntegerType.get_signless(32), [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
    return mosaic.FragmentedArray.splat(value, (), is_signed=True)


@plgpu.inline_mgpu()
def meet(_):
    """Waits for the other warps of the warpgroup: enough before overwriting what their products have finished reading.

    `plgpu.commit_smem` also makes writes visible to the matrix unit, and waits for them.
    """
    mosaic.warpgroup_barrier()


def by_row(x, shape=(C, C)):
    return lax.broadcast_in_dim(x, shape, (0,))


def by_column(x, shape=(C, C)):
    return lax.broadcast_in_dim(x, shape, (1,))


def _rows(zero):
    """Row numbers [C], int32, in the layout of the matrix unit."""
    return plgpu.broadcasted_iota(i32, (C,), 0, layout=ROWS.reduce(1)) + zero


def _columns(width, zero):
    """Column numbers [C, width], float16."""
    column = plgpu.broadcasted_iota(i32, (width,), 0, layout=ROWS.reduce(0)) + zero
    return by_column(column.astype(f16), (C, width))


def between(column, low, high):
    """Float16 0/1 matrix: low < column <= high, bounds per row. Packed arithmetic, and never a compile-time constant:
    a constant register operand of wgmma was seen to lose terms."""
    above = column - by_row(low.astype(f16), column.shape)
    below = by_row((high + 1).astype(f16), column.shape) - column
    return jnp.minimum(jnp.maximum(jnp.minimum(above, below), f16(0)), f16(1))


def _span(row, column, b):
    """0/1: row i marks the tokens whose decays lie between i and the anchor of its pair of b-blocks."""
    anchor = jnp.where((row & b) != 0, row & -b, (row & -b) + b)
    return between(column, jnp.minimum(row, anchor), jnp.maximum(row, anchor))


def _pair(row, column, b):
    """0/1: rows of a second b-block against the columns of the first of their pair."""
    second = (row & b) != 0
    anchor = row & -b
    return between(column, jnp.where(second, anchor - b - 1, C), jnp.where(second, anchor - 1, -1))


def _log2_decay(gate: Gate, raw, bias, rate):
    """Float16 log2-decay of one 64-channel tile; bias is in log2 units, rate is minus the slope of the gate."""
    if gate is None:
        return raw
    z = blocks.to_float32(raw) * LOG2E + by_column(bias)
    if isinstance(gate, SoftplusGate):
        softplus = jnp.maximum(z, 0.0) + blocks.log2(1.0 + jnp.exp2(-jnp.abs(z)))
        return jnp.maximum((rate * softplus).astype(f16), f16(FORGET))
    root = lax.rsqrt(1.0 + jnp.exp2(rate * z))  # 1 / (1 + x) as a square: no division
    return (gate.bound * LOG2E * root * root).astype(f16)


def _decays(inputs: _Inputs, rate, options: _Options):
    """Float16 log2-decays, one [C, HALF] per half of the channels."""
    decays = []
    for channels in _halves(options):
        bias = plgpu.load(inputs.bias.at[channels], layout=ROWS.reduce(0))
        raw = plgpu.load(inputs.g.at[:, channels], layout=ROWS)
        decays.append(_log2_decay(options.gate, raw, bias, rate))
    if inputs.code is None:
        return decays
    code = plgpu.load(inputs.code, layout=ROWS.reduce(1))
    # Padding keeps the state, the first token of a segment clears it.
    fill = jnp.where(code == RESET, FORGET, 0.0).astype(f16)
    return [jnp.where(by_row(code, x.shape) == 0, x, by_row(fill, x.shape)) for x in decays]


def _unit(raw, code, factor, options: _Options):
    """Float16 rows of length `factor`, or multiplied by it, one [C, HALF] per half of the channels."""
    xs = [plgpu.load(raw.at[:, channels], layout=ROWS) for channels in _halves(options)]
    if code is not None:
        padding = by_row(plgpu.load(code, layout=ROWS.reduce(1)), (C, HALF)) == PADDING
        xs = [jnp.where(padding, jnp.zeros_like(x), x) for x in xs]
    xs = [blocks.to_float32(x) for x in xs]
    if options.normalize:
        factor = lax.rsqrt(sum(jnp.sum(x * x, 1) for x in xs) + L2_EPS) * factor
        return [(x * by_row(factor, x.shape)).astype(f16) for x in xs]
    return [(x * factor).astype(f16) if factor != 1.0 else x.astype(f16) for x in xs]


def _halves(options: _Options):
    return [pl.ds(half * HALF, HALF) for half in range(options.halves)]


def _fine_levels(flipped, keys, queries, beta, zero):
    """The levels inside the 16 tokens of a warp, in registers.

    At level n a pair of neighbouring blocks of b = 2^n tokens is anchored at the first token of the second: rows decay
    since the anchor, columns until it, so every exponent is <= 0. T grows as T - T L_n T, with L_n this level's part
    of L.

    Returns:
      (T float32, Aqk float16), each as (blocks on the diagonal, corners).
    """
    empty = lambda: plgpu.layout_cast(jnp.zeros((C, blocks.SIDE), f32), ROWS)
    row, column, token = _rows(zero) & (OWN - 1), _columns(blocks.SIDE, zero), _columns(OWN, zero)
    minus_beta = -by_row(beta, (C, blocks.SIDE))

    def correlations(n, corner):
        sums, span = (empty(), empty()), _span(row, token, jnp.int32(1) << n)
        for decay, key, query in zip(flipped, keys, queries, strict=True):
            factor = blocks.exp2(blocks.mix(span, decay))
            sums = blocks.correlate(sums, query * factor, key * factor, corner=corner)
        qk, kk = sums
        return qk.astype(f16), (kk * minus_beta).astype(f16)

    def level(n, carry):
        t, aqk = carry
        qk, part = correlations(n, corner=False)
        pair = _pair(row & 7, column, jnp.int32(1) << n)
        t16 = t.astype(f16)
        t = t + blocks.multiply(t16, blocks.multiply(part * pair, t16).astype(f16))
        return t, aqk + qk * pair

    diagonal = (empty(), empty())
    for key, query in zip(keys, queries, strict=True):
        diagonal = blocks.correlate(diagonal, query, key, corner=False)
    identity = between(column, (row & 7) - 1, row & 7)
    t, aqk = lax.fori_loop(0, FINE - 1, level, (identity.astype(f32), diagonal[0].astype(f16) * identity))
    aqk_corner, part = correlations(FINE - 1, corner=True)
    t16 = t.astype(f16)
    t_corner = blocks.multiply(t16, blocks.multiply(part, t16, corner=True).astype(f16))
    return (t, t_corner), (aqk, aqk_corner)


def _own_factors(flipped, zero):
    """Decays inside the 16 tokens of a warp: (from before its first token to each one, from each one to its last)."""
    row, column = _rows(zero) & (OWN - 1), _columns(OWN, zero)
    since, until = between(column, row * 0 - 1, row), between(column, row, row * 0 + OWN - 1)
    return tuple([blocks.exp2(blocks.mix(span, decay)) for decay in flipped] for span in (since, until))


def _tabulate(work: _Work):
    """From each block's sum of decays to the factors across whole blocks, [kind, block] of the table.

    Returns:
      2 to the sum over the chunk, float32.
    """
    a, b, c, d = (plgpu.load(work.sums.at[SUMS + n], layout=CHANNELS) for n in range(4))
    none = a - a
    rows = (none, a, a + b, a + b + c), (b + c + d, c + d, d, none), (b, none, none, c)
    for n, exponent in enumerate(x for kind in rows for x in kind):
        work.table.at[n][...] = jnp.exp2(exponent).astype(f16)
    return jnp.exp2(a + b + c + d)


def _coarse_levels(reads, asks, writes, beta, work: _Work, options: _Options):
    """The two levels that join the tokens of different warps, anchored at the last token of the first block.

    The factors across whole blocks come from the table; `work.kr` already holds `writes`.

    Returns:
      (minus L of each level, their part of Aqk), float16 [C, C].
    """
    across = _factors(work, ACROSS, options)
    each = list(enumerate(_halves(options)))
    for (_, channels), x in zip(each, _times(writes, across), strict=True):
        work.kg.at[:, channels][...] = x
    plgpu.commit_smem()
    with_keys = lambda x, keys: [(x[half], keys.at[:, channels].T) for half, channels in each]
    qk, kk = products(with_keys(asks, work.kr), with_keys(reads, work.kr))
    aqk = blocks.neighbours(qk.astype(f16))
    part = blocks.neighbours((kk * -by_row(beta)).astype(f16))
    first = work.kg.at[pl.ds(0, C // 2)]
    (qk,) = products(with_keys(_times(asks, across), first), shape=(C, C // 2))
    (kk,) = products(with_keys(_times(reads, across), first), shape=(C, C // 2))  # after qk, not beside it: registers
    last_part = blocks.lower_left((kk * -by_row(beta, kk.shape)).astype(f16))
    return (part, last_part), aqk + blocks.lower_left(qk.astype(f16))


def _factors(work: _Work, kind: int, options: _Options):
    return [blocks.load_row(work.table, row=kind, column=half * HALF, width=HALF) for half in range(options.halves)]


def _times(xs, factors):
    return [x * factor for x, factor in zip(xs, factors, strict=True)]


def _merge(t, part, t_s):
    """T - T L T, with minus L given; t_s holds T in float16 before and afterwards."""
    t16 = t.astype(f16)
    (right,) = products([(part, t_s)])
    meet()
    t_s[...] = right.astype(f16)
    plgpu.commit_smem()
    t = add_product(t, t16, t_s)
    meet()
    t_s[...] = t.astype(f16)
    return t


def _prepare_chunk(
    bh, n, inputs: _Inputs, arrived, load_next, rate, outs: Prepared, work: _Work, zero, options: _Options
):
    """One chunk of one head by one warpgroup."""
    plgpu.barrier_wait(arrived[0])
    flipped = [blocks.flip(x) for x in _decays(inputs, rate, options)]
    beta = plgpu.load(inputs.beta, layout=ROWS.reduce(1))
    plgpu.barrier_wait(arrived[1])
    keys = _unit(inputs.k, inputs.code, 1.0, options)
    queries = _unit(inputs.q, inputs.code, options.scale, options)
    meet()  # every warp has its inputs in registers
    load_next()
    t, aqk = _fine_levels(flipped, keys, queries, beta, zero)
    since, until = _own_factors(flipped, zero)
    reads, asks, writes = _times(keys, since), _times(queries, since), _times(keys, until)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results of the last chunk have left
    for half, channels in enumerate(_halves(options)):
        blocks.store_sums(flipped[half], work.sums, row=SUMS, column=half * HALF)
        work.kr.at[:, channels][...] = writes[half]
    meet()
    outs.gamma.at[bh, n][...] = _tabulate(work)
    meet()
    parts, aqk_coarse = _coarse_levels(reads, asks, writes, beta, work, options)
    t, aqk = blocks.spread(*t), blocks.spread(*aqk) + aqk_coarse
    before, after = (_factors(work, kind, options) for kind in (BEFORE, AFTER))
    meet()  # the products are past their reads
    work.t[...] = t.astype(f16)
    for half, channels in enumerate(_halves(options)):
        work.kg.at[:, channels][...] = reads[half] * before[half]
        work.kr.at[:, channels][...] = plgpu.load(work.kr.at[:, channels], layout=ROWS) * after[half]
        work.qg.at[:, channels][...] = asks[half] * before[half]
    plgpu.commit_smem()
    for source, target in zip(work[:3], outs[:3], strict=True):
        plgpu.copy_smem_to_gmem(source, target.at[bh, n])
    t = _merge(t, parts[0], work.t)
    plgpu.commit_smem()
    _merge(t, parts[1], work.t)
    work.aqk[...] = aqk
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(work.t, outs.t.at[bh, n])
    plgpu.copy_smem_to_gmem(work.aqk, outs.aqk.at[bh, n])


def _load_inputs(place, source: _Inputs, target: _Inputs, arrived, options: _Options):
    """Starts every copy into shared memory that one chunk needs; the gate comes first, and is worked on meanwhile."""
    b, n, hv, bh = place
    gates_in, heads_in = arrived
    rows, h = pl.ds(n * C, C), lax.div(hv, options.group)
    plgpu.copy_gmem_to_smem(source.g.at[b, rows, hv], target.g, gates_in)
    plgpu.copy_gmem_to_smem(source.bias.at[bh], target.bias, gates_in)
    plgpu.copy_gmem_to_smem(source.beta.at[bh, n], target.beta, gates_in)
    if source.code is not None:
        plgpu.copy_gmem_to_smem(source.code.at[b, n], target.code, gates_in)
    plgpu.copy_gmem_to_smem(source.k.at[b, rows, h], target.k, heads_in)
    plgpu.copy_gmem_to_smem(source.q.at[b, rows, h], target.q, heads_in)


def prepare(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "BH N C"],
    code: Int[Array, "B N C"] | None,
    gate: Gate,
    *,
    scale: float,
    normalize_qk: bool,
) -> Prepared:
    """Runs the preparation kernel.

    Args:
      q, k: bfloat16 or float16, K 64 or 128, T a multiple of 64; any values at padding.
      g: log-decay, or the gate's raw logit; bfloat16, float16 or float32.
      beta: float32, 0 at padding.
      code: int32 per token, RESET where a segment starts, PADDING; None: every token is ordinary.
      gate: with the rows of the batch first: a_log [B, HV], dt_bias [B, HV, K].
    """
    B, T, H, K = q.shape
    HV = g.shape[2]
    N, packed = T // C, code is not None
    total, stride = B * N * HV, MULTIPROCESSORS * TEAMS
    options = _Options(gate, scale, normalize_qk, halves=K // HALF, group=HV // H)
    bias, rate = _gate_parameters(gate, B * HV, K)
    if gate is None:  # 16 bits like a raw logit, and what the kernel would round it to
        g = jnp.maximum((g.astype(f32) * LOG2E).astype(f16), f16(FORGET))
    arrays = [q, k, g, beta, bias, *([code.astype(f32)] if packed else [])]

    def kda_prepare(rates, *refs):
        source = _Inputs(*refs[: len(arrays)], *(() if packed else (None,)))
        outs, scratch = Prepared(*refs[len(arrays) :][:6]), refs[len(arrays) + 6 :]
        team, block = lax.axis_index("team"), lax.axis_index("block")
        first = block * TEAMS + team  # heads next to each other: neighbouring memory

        def place(index):
            hv, r = lax.rem(index, HV), lax.div(index, HV)
            n, b = N - 1 - lax.rem(r, N), lax.div(r, N)  # first chunks last: the recurrence finds them in the cache
            return b, n, hv, b * HV + hv

        def load(index, target, arrived):
            pl.when(index < total)(lambda: _load_inputs(place(index), source, target, arrived, options))

        def rate_of(index):  # a chunk ahead of its use, since it comes straight from device memory
            return rates[place(jnp.minimum(index, total - 1))[-1]]

        def step(i, rate):
            index = first + i * stride

            @pl.when(index < total)
            def _():
                zero = hidden_zero()
                inputs, work, arrived = _mine(scratch, team + zero, packed, K)
                _, n, _, bh = place(index)
                load_next = lambda: load(index + stride, inputs, arrived)
                _prepare_chunk(bh, n, inputs, arrived, load_next, rate, outs, work, zero, options)

            return rate_of(index + stride)

        inputs, _, arrived = _mine(scratch, team, packed, K)
        load(first, inputs, arrived)
        lax.fori_loop(0, pl.cdiv(total, stride), step, rate_of(first))
        plgpu.wait_smem_to_gmem(0)

    struct = jax.ShapeDtypeStruct
    BH = B * HV
    launch = plgpu.kernel(
        kda_prepare,
        out_type=Prepared(
            *[struct((BH, N, C, K), f16)] * 3, *[struct((BH, N, C, C), f16)] * 2, struct((BH, N, 128), f32)
        ),
        grid=(MULTIPROCESSORS,),
        grid_names=("block",),
        num_threads=TEAMS,
        thread_name="team",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,  # the kernel commits by hand: worth 1-2 %
            reduction_scratch_bytes=0,  # only sums along rows, which stay inside a warp
        ),
        scratch_types=_scratch(q.dtype, g.dtype, K, packed),
    )
    prepared = launch(rate, *arrays)
    return prepared._replace(gamma=prepared.gamma[..., :K])


def _scratch(dtype, gate_dtype, K: int, packed: bool):
    """Shared memory of all teams: inputs, work, and the barriers at which the inputs arrive; see `_mine`."""
    return [
        *[tile(TEAMS, C, K, dtype=dtype)] * 2,
        tile(TEAMS, C, K, dtype=gate_dtype),
        plgpu.SMEM((TEAMS, 2 * C + K), f32),  # beta, bias, code: each alone would be padded to 1 KB
        *[tile(TEAMS, C, K)] * 3,
        tile(TEAMS, C, C),
        # Aqk is written when the table has been read; 8 KB per team each.
        plgpu.RefUnion(tile(TEAMS, C, C), plgpu.SMEM((TEAMS, 32, 128), f16), plgpu.SMEM((TEAMS, 16, 128), f32)),
        plgpu.Barrier(num_arrivals=3 + packed, num_barriers=TEAMS),
        plgpu.Barrier(num_arrivals=2, num_barriers=TEAMS),
    ]


def _mine(scratch, team, packed: bool, K: int):
    """One team's part of `_scratch`: (inputs, work, barriers of the gates and of the heads)."""
    *plain, union, gates_in, heads_in = scratch
    q, k, g, vectors, *work = (ref.at[team] for ref in (*plain, *union))
    beta, bias, code = (vectors.at[pl.ds(*where)] for where in ((0, C), (C, K), (C + K, C)))
    return _Inputs(q, k, g, beta, bias, code if packed else None), _Work(*work), (gates_in.at[team], heads_in.at[team])


def _gate_parameters(gate: Gate, BH: int, K: int):
    """(bias in log2 units [BH, K], minus the slope [BH]), float32."""
    if gate is None:
        return jnp.zeros((BH, K), f32), jnp.zeros((BH,), f32)
    slope = jnp.ones((BH,), f32) if gate.a_log is None else jnp.exp(gate.a_log.astype(f32)).reshape(BH)
    return (gate.dt_bias.astype(f32) * LOG2E).reshape(BH, K), -slope
