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

from pallas_kernels.kda.gates import Gate, SoftplusGate
from pallas_kernels.kda.reference import L2_EPS

C = 64  # tokens per chunk
HALF = 64  # channels per shared-memory tile of 128-byte rows
LEVELS = 6  # block sizes 1, 2, 4, ..., 32
TEAMS = 3  # warpgroups per block, each on a chunk of its own: 168 registers a thread, 72 KB of shared memory each
BLOCKS = 132  # multiprocessors of an H100 or H200; another number is correct, not as fast
LOG2E = math.log2(math.e)
FORGET = -3e4  # log2 of the decay that clears a state: 2**FORGET is exactly 0, and float16 holds it
RESET, PADDING = 1, 2  # token codes; 0 is an ordinary token

f32, f16, i32 = jnp.float32, jnp.float16, jnp.int32
ROWS = plgpu.Layout.WGMMA


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


def _indices(zero):
    """(row numbers [C], int32; column numbers [C, C], float16) in the layout of the matrix unit."""
    row = plgpu.broadcasted_iota(i32, (C,), 0, layout=ROWS.reduce(1)) + zero
    column = plgpu.broadcasted_iota(i32, (C,), 0, layout=ROWS.reduce(0)) + zero
    return row, by_column(column.astype(f16))


def between(column, low, high):
    """Float16 0/1 matrix: low < column <= high, bounds per row. Packed arithmetic, and never a compile-time constant:
    a constant register operand of wgmma was seen to lose terms."""
    above = column - by_row(low.astype(f16))
    below = by_row((high + 1).astype(f16)) - column
    return jnp.minimum(jnp.maximum(jnp.minimum(above, below), f16(0)), f16(1))


def _log2_decay(gate: Gate, raw, bias, rate):
    """Float16 log2-decay of one 64-channel tile; bias is in log2 units, rate is minus the slope of the gate."""
    if gate is None:
        return jnp.maximum((raw.astype(f32) * LOG2E).astype(f16), f16(FORGET))
    z = raw.astype(f32) * LOG2E + by_column(bias)
    if isinstance(gate, SoftplusGate):
        softplus = jnp.maximum(z, 0.0) + lax.log(1.0 + jnp.exp2(-jnp.abs(z))) * LOG2E
        return jnp.maximum((rate * softplus).astype(f16), f16(FORGET))
    root = lax.rsqrt(1.0 + jnp.exp2(rate * z))  # 1 / (1 + x) as a square: no division
    return (gate.bound * LOG2E * root * root).astype(f16)


def _levels(gx, k_s, q_s, m_s, beta_s, aqk, halves, zero):
    """Lower triangles by levels, fine to coarse, and the inverse merged along the way.

    At level b a pair of neighbouring b-blocks is anchored at the first row of the second: rows decay since the anchor,
    columns until it, so every exponent is <= 0. T grows as T - T L_b T, with L_b this level's part of L.

    Returns:
      (T float32, Aqk float16), complete.
    """
    row, column = _indices(zero)
    minus_beta = -by_row(plgpu.load(beta_s, layout=ROWS.reduce(1)))
    identity = between(column, row - 1, row)

    def level(n, carry):
        t, aqk = carry
        b = jnp.int32(1) << n
        second = (row & b) != 0  # rows of the second block of their pair
        anchor = jnp.where(second, row & -b, (row & -b) + b)
        span = between(column, jnp.minimum(row, anchor), jnp.maximum(row, anchor))
        t16 = t.astype(f16)
        meet()  # the last level's products are past their reads of m
        m_s[...] = t16
        queries = []
        for half in range(halves):
            channels = pl.ds(half * HALF, HALF)
            (exponent,) = products([(span, gx.at[half])])
            decay = jnp.exp2(exponent).astype(f16)
            gx.at[2 + half][...] = plgpu.load(k_s.at[:, channels], layout=ROWS) * decay
            queries.append(plgpu.load(q_s.at[:, channels], layout=ROWS) * decay)
        plgpu.commit_smem()
        keys = [gx.at[2 + half] for half in range(halves)]
        pair = between(column, jnp.where(second, anchor - b - 1, 100), jnp.where(second, anchor - 1, -1))
        (qk,) = products([(x, key.T) for x, key in zip(queries, keys, strict=True)])
        aqk = aqk + qk.astype(f16) * pair
        (kk,) = products([(key, key.T) for key in keys])  # after qk, not beside it: registers
        part = (kk * minus_beta).astype(f16) * pair
        (right,) = products([(part, m_s)])
        meet()
        m_s[...] = right.astype(f16)
        plgpu.commit_smem()
        return add_product(t, t16, m_s), aqk

    return lax.fori_loop(0, LEVELS, level, (identity.astype(f32), aqk * identity))


def _load_inputs(chunk, refs, buffers, gates_in, heads_in, *, halves, group, packed):
    """Starts every copy into shared memory that one chunk needs; the gate comes first, and is worked on meanwhile."""
    b, n, hv, bh = chunk
    q, k, g, beta, bias, code = refs
    q_s, k_s, g_s, beta_s, bias_s, code_s = buffers
    rows, h = pl.ds(n * C, C), lax.div(hv, group)
    for half in range(halves):
        plgpu.copy_gmem_to_smem(g.at[b, rows, hv, pl.ds(half * HALF, HALF)], g_s.at[half], gates_in)
    plgpu.copy_gmem_to_smem(bias.at[hv], bias_s, gates_in)
    plgpu.copy_gmem_to_smem(beta.at[bh, n], beta_s, gates_in)
    if packed:
        plgpu.copy_gmem_to_smem(code.at[b, n], code_s, gates_in)
    plgpu.copy_gmem_to_smem(k.at[b, rows, h], k_s, heads_in)
    plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_s, heads_in)


def _chunk_kernel(chunk, refs, rate, outs, scratch, zero, *, gate, scale, normalize, halves, group, packed):
    """One chunk of one head by one warpgroup; see `Prepared` for what it writes."""
    _, n, _, bh = chunk
    kg_o, kr_o, qg_o, t_o, aqk_o, gamma_o = outs
    (q_raw, q_s), (k_raw, k_s), (g_raw, gx), m_s, beta_s, bias_s, code_s, gamma_s, gates_in, heads_in = scratch
    inputs = (q_raw, k_raw, g_raw, beta_s, bias_s, code_s)
    _load_inputs(chunk, refs, inputs, gates_in, heads_in, halves=halves, group=group, packed=packed)
    plgpu.barrier_wait(gates_in)
    code = plgpu.load(code_s, layout=ROWS.reduce(1)) if packed else None

    def forget(decay):  # padding keeps the state, the first token of a segment clears it
        fill = jnp.where(code == RESET, FORGET, 0.0).astype(f16)
        return jnp.where(by_row(code, decay.shape) == 0, decay, by_row(fill, decay.shape))

    def unit(raw, factor):
        x = plgpu.load(raw, layout=ROWS)
        if packed:
            x = jnp.where(by_row(code, x.shape) == PADDING, jnp.zeros_like(x), x)
        x = x.astype(f32)
        if normalize:
            return (x * by_row(lax.rsqrt(jnp.sum(x * x, 1) + L2_EPS) * factor, x.shape)).astype(f16)
        return (x * factor).astype(f16) if factor != 1.0 else x.astype(f16)

    decays = []
    for half in range(halves):
        bias = plgpu.load(bias_s.at[pl.ds(half * HALF, HALF)], layout=ROWS.reduce(0))
        decay = _log2_decay(gate, plgpu.load(g_raw.at[half], layout=ROWS), bias, rate)
        decays.append(forget(decay) if packed else decay)
    if g_raw.dtype == f32:
        plgpu.commit_smem()  # the float32 tiles overlap both float16 ones
    for half in range(halves):
        gx.at[half][...] = decays[half]
    m_s[...] = plgpu.layout_cast(jnp.ones((C, C), f16), ROWS)
    plgpu.barrier_wait(heads_in)
    k_s[...] = unit(k_raw, 1.0)
    q_s[...] = unit(q_raw, scale)
    plgpu.commit_smem()
    (diagonal,) = products([(q_s, k_s.T)])
    for half in range(halves):  # log2 of gamma: a column of equal sums for every channel
        (total,) = products([(gx.at[half].T, m_s.at[pl.ds(0, 8)].T)], shape=(HALF, 8))
        gamma_s[pl.ds(half * HALF, HALF)] = jnp.exp2(jnp.max(total, 1))
    t, aqk = _levels(gx, k_s, q_s, m_s, beta_s, diagonal.astype(f16), halves, zero)
    meet()
    m_s[...] = t.astype(f16)

    row, column = _indices(zero)
    since, until = between(column, row * 0 - 1, row), between(column, row, row * 0 + C - 1)
    for half in range(halves):
        channels = pl.ds(half * HALF, HALF)
        entering, leaving = products([(since, gx.at[half])], [(until, gx.at[half])])
        entering, leaving = jnp.exp2(entering).astype(f16), jnp.exp2(leaving).astype(f16)
        key = plgpu.load(k_s.at[:, channels], layout=ROWS)
        gx.at[2 + half][...] = key * leaving
        k_s.at[:, channels][...] = key * entering
        q_s.at[:, channels][...] = plgpu.load(q_s.at[:, channels], layout=ROWS) * entering
    plgpu.commit_smem()
    gx.at[0][...] = aqk
    plgpu.copy_smem_to_gmem(k_s, kg_o.at[bh, n])
    plgpu.copy_smem_to_gmem(q_s, qg_o.at[bh, n])
    for half in range(halves):
        plgpu.copy_smem_to_gmem(gx.at[2 + half], kr_o.at[bh, n, :, pl.ds(half * HALF, HALF)])
    plgpu.copy_smem_to_gmem(m_s, t_o.at[bh, n])
    plgpu.copy_smem_to_gmem(gamma_s, gamma_o.at[bh, n])
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(gx.at[0], aqk_o.at[bh, n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


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
    """
    B, T, H, K = q.shape
    HV = g.shape[2]
    N, halves, packed = T // C, K // HALF, code is not None
    total = B * N * HV
    bias, rate = _gate_parameters(gate, HV, K)

    def kernel(*refs):
        q, k, g, beta, bias, rate = refs[:6]
        code = refs[6] if packed else None
        outs, scratch = refs[-6 - SCRATCH : -SCRATCH], refs[-SCRATCH:]
        team, block = lax.axis_index("team"), lax.axis_index("block")

        @pl.loop(0, pl.cdiv(total, BLOCKS * TEAMS))
        def _(i):
            index = (i * BLOCKS + block) * TEAMS + team  # heads next to each other: neighbouring memory

            @pl.when(index < total)
            def _():
                hv, r = lax.rem(index, HV), lax.div(index, HV)
                n, b = lax.rem(r, N), lax.div(r, N)
                zero = hidden_zero()
                slot, unions, plain = team + zero, scratch[:3], scratch[3:]
                mine = [[view.at[slot] for view in union] for union in unions] + [ref.at[slot] for ref in plain]
                _chunk_kernel(
                    *((b, n, hv, b * HV + hv), (q, k, g, beta, bias, code), rate[hv], outs, mine, zero),
                    **dict(gate=gate, scale=scale, normalize=normalize_qk, halves=halves, group=HV // H, packed=packed),
                )

    struct = jax.ShapeDtypeStruct
    BH = B * HV
    launch = plgpu.kernel(
        kernel,
        out_type=Prepared(
            *[struct((BH, N, C, K), f16)] * 3, *[struct((BH, N, C, C), f16)] * 2, struct((BH, N, K), f32)
        ),
        grid=(BLOCKS,),
        grid_names=("block",),
        num_threads=TEAMS,
        thread_name="team",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,  # the kernel commits by hand: worth 1-2 %
            reduction_scratch_bytes=0,  # only sums along rows, which stay inside a warp
        ),
        scratch_types=_scratch(q.dtype, g.dtype, K, gate_copies=2 + halves + packed),
    )
    return launch(q, k, g, beta, bias, rate, *([code] if packed else []))


SCRATCH = 10  # buffers made by _scratch


def _scratch(dtype, gate_dtype, K: int, gate_copies: int):
    """Shared memory of all teams, as the kernel unpacks it; raw inputs share their bytes with what replaces them."""
    gates = tile(TEAMS, 4, C, HALF)  # float16: decay (2 tiles), then this level's keys (2 tiles)
    raw = tile(TEAMS, 2 if gate_dtype == f32 else 4, C, HALF, dtype=gate_dtype)
    return [
        plgpu.RefUnion(tile(TEAMS, C, K, dtype=dtype), tile(TEAMS, C, K)),
        plgpu.RefUnion(tile(TEAMS, C, K, dtype=dtype), tile(TEAMS, C, K)),
        plgpu.RefUnion(raw, gates),
        tile(TEAMS, C, C),
        plgpu.SMEM((TEAMS, C), f32),
        plgpu.SMEM((TEAMS, K), f32),
        plgpu.SMEM((TEAMS, C), i32),
        plgpu.SMEM((TEAMS, K), f32),
        plgpu.Barrier(num_arrivals=gate_copies, num_barriers=TEAMS),
        plgpu.Barrier(num_arrivals=2, num_barriers=TEAMS),
    ]


def _gate_parameters(gate: Gate, HV: int, K: int):
    """(bias in log2 units [HV, K], minus the slope [HV]), float32."""
    if gate is None:
        return jnp.zeros((HV, K), f32), jnp.zeros((HV,), f32)
    slope = jnp.ones((HV,), f32) if gate.a_log is None else jnp.exp(gate.a_log.astype(f32))
    return gate.dt_bias.astype(f32) * LOG2E, -slope
