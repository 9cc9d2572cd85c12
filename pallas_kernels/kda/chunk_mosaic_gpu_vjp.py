"""Backward of KDA on Hopper: the reverse chain over chunks, then the gradients inside every chunk."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kda.gates import Gate, LowerBoundGate
from pallas_kernels.kda.mirror_vjp import LN2, Gradients, cotangent_scale
from pallas_kernels.kda.prepare_mosaic_gpu import (
    FORGET,
    LEVELS,
    LOG2E,
    PADDING,
    C,
    between,
    by_column,
    by_row,
    hidden_zero,
    meet,
    tile,
)
from pallas_kernels.kda.reference import L2_EPS

W = plgpu.Layout.WGMMA
ROW, COL = W.reduce(1), W.reduce(0)  # layouts of one value per row, per column
f16, bf16, f32, i32, u32 = jnp.float16, jnp.bfloat16, jnp.float32, jnp.int32, jnp.uint32
SLAB = 64  # columns that one warpgroup owns
NUM_CTAS = 132  # multiprocessors of an H100; the chunk-parallel kernel is persistent
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _union(*shape, dtypes):
    """A tile seen through several dtypes; see `_view`."""
    return plgpu.RefUnion(*(tile(*shape, dtype=dtype) for dtype in dict.fromkeys(map(jnp.dtype, dtypes))))


def _view(union, dtype):
    return next(ref for ref in union if ref.dtype == dtype)


def _products(*groups, shape=(C, SLAB), meanwhile=None):
    """Each group, a list of (A, B) pairs, is summed in an accumulator of its own; all are in flight together.

    Returns:
      The sums, then what `meanwhile` returns, which is called while the matrix unit works.
    """

    def body(*accs):
        for acc, pairs in zip(accs, groups, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        rest = meanwhile() if meanwhile else ()
        plgpu.wgmma_wait(0)
        return *(acc[...] for acc in accs), *rest

    return pl.run_scoped(body, *[plgpu.ACC(shape, f32)] * len(groups))


# ---------------------------------------------------------------------------------------------------- reverse chain


def reverse_chain(kg, kr, qg, t, aqk, gamma, beta, do_scale, do, dfinal, *, stages=2):
    """See `mirror_vjp.reverse`, with [B * HV, NT, ...] for [B, HV, NT, ...].

    Here `do` is unscaled, [B,T,HV,V], `do_scale` [B*HV,NT,C] is 0 at padding, and `dfinal` is [B*HV,V,K].
    """
    heads, NT, _, K = kg.shape
    HV, V = do.shape[2:]
    num_wgs, state_rows = V // SLAB, (SLAB, K)

    def kernel(kg, kr, qg, t, aqk, gamma, beta, do_scale, do, dfinal, ds_out, p_out, dinitial, ds_stage, p_stage):
        bh, wg = lax.axis_index("head"), lax.axis_index("wg")
        b, h = lax.div(bh, HV), lax.rem(bh, HV)
        values = pl.ds(wg * SLAB, SLAB)

        def compute(pipeline):
            ds = plgpu.load(dfinal.at[bh, values], layout=W, optimized=False)
            dinitial.at[bh, values][...] = pipeline(ds)
            plgpu.wait_smem_to_gmem(0)

        def chunk(index, kg_s, kr_s, qg_s, t_s, aqk_s, gamma_s, beta_s, scale_s, do_s, ds):
            n = NT - 1 - index[0]
            ds16 = ds.astype(f16)
            scale = by_column(plgpu.load(scale_s, layout=COL))
            do_t = plgpu.load(do_s.at[:, values].T, layout=W).astype(f32)
            do_t = jnp.where(scale > 0.0, do_t * scale, 0.0).astype(f16)
            (dvn,) = _products([(do_t, aqk_s), (ds16, kr_s.T)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ds_stage.at[wg][...] = ds16
            (p,) = _products([(dvn.astype(f16), t_s)])
            dv = (-p * by_column(plgpu.load(beta_s, layout=COL))).astype(f16)
            p_stage.at[wg].T[...] = p.astype(f16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ds_stage.at[wg], ds_out.at[bh, n, values])
            plgpu.copy_smem_to_gmem(p_stage.at[wg], p_out.at[bh, n, :, values])

            def accumulate(acc):
                plgpu.wgmma(acc, do_t, qg_s)
                plgpu.wgmma(acc, dv, kg_s)

            kept = ds * by_column(plgpu.load(gamma_s, layout=COL), state_rows)
            return pl.run_state(accumulate)(plgpu.ACC.init(kept))

        skip = pl.Squeezed()
        block = lambda shape, index, transforms=_SWIZZLED: plgpu.BlockSpec(shape, index, transforms=transforms)
        at = lambda i: (bh, NT - 1 - i, 0, 0)
        vector = lambda size: block((skip, skip, size), lambda i: (bh, NT - 1 - i, 0), ())
        plgpu.emit_pipeline_warp_specialized(
            chunk,
            grid=(NT,),
            memory_registers=40,
            max_concurrent_steps=stages,
            wg_axis="wg",
            num_compute_wgs=num_wgs,
            compute_context=compute,
            in_specs=[block((skip, skip, C, K), at)] * 3
            + [block((skip, skip, C, C), at)] * 2
            + [vector(K), vector(C), vector(C), block((skip, C, skip, V), lambda i: (b, NT - 1 - i, h, 0))],
            out_specs=[],
        )(kg, kr, qg, t, aqk, gamma, beta, do_scale, do)

    launch = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((heads, NT, V, K), f16),
            jax.ShapeDtypeStruct((heads, NT, C, V), f16),
            jax.ShapeDtypeStruct((heads, V, K), f32),
        ),
        grid=(heads,),
        grid_names=("head",),
        num_threads=num_wgs + 1,
        thread_name="wg",
        scratch_types=[tile(num_wgs, SLAB, K), tile(num_wgs, C, SLAB)],
    )
    return launch(kg, kr, qg, t, aqk, gamma, beta, do_scale, do, dfinal)


# ------------------------------------------------------------------------------------- gradients inside a chunk


class _GateKind(NamedTuple):
    """What the kernel must know of a gate when it is built; `bound` is None for the softplus gate."""

    raw: bool  # False: the input is the log-decay itself, already float16 in base 2
    bound: float | None = None


def _gate(kind: _GateKind, raw, bias2, rate):
    """(base-2 log-decay, its slope in nats by the logit, gradient of log rate as a function of (dg, draw))."""
    z2 = raw * LOG2E + bias2
    if kind.bound is None:
        root = lax.rsqrt(1.0 + jnp.exp2(-z2))  # 1 / (1 + x) as a squared rsqrt: no division
        g2 = -rate * (jnp.maximum(z2, 0.0) + lax.log(1.0 + jnp.exp2(-jnp.abs(z2))) * LOG2E)
        return g2, lambda: -rate * (root * root), lambda dg, draw: dg * (g2 * LN2)
    root = lax.rsqrt(1.0 + jnp.exp2(-rate * z2))
    s = root * root
    return (
        (kind.bound * LOG2E) * s,
        lambda: (kind.bound * rate) * (s - s * s),
        lambda dg, draw: draw * (z2 * LN2),
    )


def _level_masks(n, row, column):
    """Of one level of blocks: the decays that a row sums, the rows in the second block of a pair, the pairs (i, j)."""
    b = jnp.int32(1) << n
    second = (row & b) != 0
    anchor = jnp.where(second, row & -b, (row & -b) + b)
    sums = between(column, jnp.minimum(row, anchor), jnp.maximum(row, anchor))
    pair = between(column, jnp.where(second, anchor - b - 1, anchor - 1), jnp.where(second, anchor - 1, anchor + b - 1))
    return sums, by_row(jnp.where(second, 1.0, 0.0).astype(f16)), pair


# Rows of the per-token weights.
BETA, DO_SCALE, UNSCALE, DG_UNSCALE, CODE = range(5)
NUM_WEIGHTS = 5
# Vectors of 64 numbers, one of each per warpgroup: sums over its columns, then numbers per column; SUMS and PAR: two.
Q_SQUARE, K_SQUARE, Q_DOT, K_DOT, DBETA, DBETA_TOTAL, GAMMA, BOUNDARY, SUMS, _, PAR, _ = range(12)
NUM_SLOTS = 12


def _chunk_kernel(
    q_g, k_g, raw_g, do_g, p_g, r_g, h_g, ds_g, t_g, gamma_g, weight_g, par_g, ones_g, numbers_g,  # inputs
    dq_o, dk_o, dv_o, draw_o, dbeta_o, sums_o,  # outputs
    q_s, k_s, raw_s, g2_s, pair_s, r_s, h_s, ds_s, t_s, work_s,  # tiles
    ones_s, vector_s,  # a tile of ones; vectors of 64 numbers
    ones_bar, early_bar, r_bar, inputs_bar, sync_bar,
    *, sizes, kind: _GateKind, scale, normalize_qk, packed,
):  # fmt: skip
    """One persistent CTA; warpgroup wg owns 64 key columns (and 64 value columns) of every chunk it visits.

    What the next chunk needs is loaded as soon as its buffer is free: `early` (cotangents, states) before the level
    loop, which hides it; r after that loop; q, k and the gate at the end.
    """
    B, NT, H, HV, num_wgs = sizes
    own, first = lax.axis_index("wg"), lax.axis_index("cta")
    total = B * NT * HV
    num_ctas = min(NUM_CTAS, total)
    slab = pl.ds(own * SLAB, SLAB)
    here = lambda: own + hidden_zero()  # asked for anew in every stage

    def indices():
        """(row numbers [C], int32; column numbers [C, C], float16), read from memory: constants would be hoisted."""
        numbers = vector_s.at[2 * NUM_WEIGHTS + NUM_SLOTS * num_wgs + 1 + hidden_zero()]
        column = plgpu.load(numbers, layout=COL).astype(f16)
        row = plgpu.broadcasted_iota(i32, (C,), 0, layout=ROW) + hidden_zero()
        return row, by_column(column)

    wgs = range(num_wgs)
    jobs = [own] if num_wgs == 2 else [0, 1]  # the gradient of Aqk, of L: one for each warpgroup
    q_in, k_in, pair_in = _view(q_s, q_g.dtype), _view(k_s, k_g.dtype), _view(pair_s, do_g.dtype)
    q16, k16, pair16, work16 = (_view(union, f16) for union in (q_s, k_s, pair_s, work_s))
    work_in, work_b = _view(work_s, do_g.dtype), _view(work_s, bf16)
    raw_in, draw_s = _view(raw_s, raw_g.dtype), _view(raw_s, draw_o.dtype)

    def where(c):
        h, rest = lax.rem(c, HV), lax.div(c, HV)
        n, b = lax.rem(rest, NT), lax.div(rest, NT)
        return b, n, h, b * HV + h, pl.ds(n * C, C)

    def only(which, f):
        f() if num_wgs == 1 else pl.when(own == which)(f)

    def load_early(c, parity):
        wg = own
        b, n, h, bh, rows = where(c)
        plgpu.copy_gmem_to_smem(do_g.at[b, rows, h, slab], pair_in.at[0, wg], early_bar)
        plgpu.copy_gmem_to_smem(p_g.at[bh, n, :, slab], pair16.at[1, wg], early_bar)
        plgpu.copy_gmem_to_smem(h_g.at[bh, n, :, slab], h_s.at[wg], early_bar)
        plgpu.copy_gmem_to_smem(ds_g.at[bh, n, :, slab], ds_s.at[wg], early_bar)

        @functools.partial(only, 0)
        def _():
            plgpu.copy_gmem_to_smem(t_g.at[bh, n], t_s.at[0], early_bar)
            plgpu.copy_gmem_to_smem(
                weight_g.at[bh, n], vector_s.at[pl.ds(parity * NUM_WEIGHTS, NUM_WEIGHTS)], early_bar
            )

    def load_r(c):
        wg = own
        _, n, _, bh, _ = where(c)
        plgpu.copy_gmem_to_smem(r_g.at[bh, n, :, slab], r_s.at[wg], r_bar)

    def load_inputs(c):
        wg = own
        b, n, h, bh, rows = where(c)
        head = h if H == HV else lax.div(h, HV // H)
        plgpu.copy_gmem_to_smem(q_g.at[b, rows, head, slab], q_in.at[wg], inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(k_g.at[b, rows, head, slab], k_in.at[wg], inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(raw_g.at[b, rows, h, slab], raw_in.at[wg], inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(gamma_g.at[bh, n, wg], slot_s(GAMMA, wg), inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(par_g.at[h, wg], pair_of_rows(PAR, wg), inputs_bar.at[wg])

    def sync(i):
        """Every warpgroup has done what precedes, and its writes are seen by all, the copy engine included."""
        plgpu.commit_smem()
        if num_wgs == 2:
            plgpu.barrier_arrive(sync_bar.at[i])
            plgpu.barrier_wait(sync_bar.at[i])

    def column_sums(*tiles):
        """Sums over rows of committed tiles, one number per column: eight equal columns of a product with ones."""
        (sums,) = _products([(x.T, ones_s.T) for x in tiles], shape=(SLAB, 8))
        return jnp.max(sums, 1)

    def split(x):
        """x in two bfloat16 tiles: 16 bits of it."""
        wg = here()
        high = x.astype(bf16)
        work_b.at[wg, 0][...] = high
        work_b.at[wg, 1][...] = (x - high.astype(f32)).astype(bf16)
        return work_b.at[wg, 0], work_b.at[wg, 1]

    slot_s = lambda slot, i: vector_s.at[2 * NUM_WEIGHTS + slot * num_wgs + i]
    pair_of_rows = lambda slot, wg: vector_s.at[pl.ds(2 * NUM_WEIGHTS + slot * num_wgs + 2 * wg, 2)]
    diagonal_s = lambda: slot_s(NUM_SLOTS, hidden_zero())
    row_weight = lambda i, parity: plgpu.load(vector_s.at[parity * NUM_WEIGHTS + i], layout=ROW)
    beta_columns = lambda parity: by_column(plgpu.load(vector_s.at[parity * NUM_WEIGHTS + BETA], layout=COL))
    total_over_wgs = lambda slot: sum(plgpu.load(slot_s(slot, i + hidden_zero()), layout=ROW) for i in wgs)
    inverse_norm = lambda slot: lax.rsqrt(total_over_wgs(slot) + L2_EPS)
    read = lambda ref: plgpu.load(ref, layout=W).astype(f32)

    def clean(x, parity):
        """Zero in place of padding, which may hold anything."""
        return jnp.where(by_row(row_weight(CODE, parity)) > 1.5, 0.0, x) if packed else x

    def gate(parity):
        wg = here()
        bias2, rate = (by_column(plgpu.load(pair_of_rows(PAR, wg).at[i], layout=COL)) for i in range(2))
        return _gate(kind, clean(read(raw_in.at[wg]), parity), bias2, rate)

    def new_values(c, parity):
        """Vn in place of r, do scaled in place, dv, and the part of dbeta that comes through r."""
        wg = here()
        b, _, h, _, rows = where(c)
        do_scale = by_row(row_weight(DO_SCALE, parity))
        do = read(pair_in.at[0, wg]) * do_scale
        pair16.at[0, wg][...] = (jnp.where(do_scale > 0.0, do, 0.0) if packed else do).astype(f16)
        p = read(pair16.at[1, wg])
        slot_s(DBETA, wg)[...] = jnp.sum(p * read(r_s.at[wg]), 1)
        work_in.at[wg, 0][...] = (p * by_row(row_weight(BETA, parity) * row_weight(UNSCALE, parity))).astype(
            work_in.dtype
        )
        t_beta = read(t_s.at[wg - own]) * beta_columns(parity)
        (vn,) = _products([(t_beta.astype(f16), r_s.at[wg])])
        plgpu.commit_smem()
        r_s.at[wg][...] = vn.astype(f16)
        plgpu.copy_smem_to_gmem(work_in.at[wg, 0], dv_o.at[b, rows, h, slab])

    def prepare_inputs(parity):
        """The gate in base 2, and this warpgroup's part of the squared norms."""
        wg = here()
        g2 = jnp.maximum(gate(parity)[0], FORGET) if kind.raw else clean(read(raw_in.at[wg]), parity)
        if packed:
            code = by_row(row_weight(CODE, parity))
            g2 = jnp.where(code > 0.5, jnp.where(code > 1.5, 0.0, FORGET), g2)
        g2_s.at[wg][...] = g2.astype(f16)
        for slot, ref in ((Q_SQUARE, q_in), (K_SQUARE, k_in)):
            x = clean(read(ref.at[wg]), parity)
            slot_s(slot, wg)[...] = jnp.sum(x * x, 1)

    def normalize(slot, x_in, x16, parity):
        wg = here()
        x = clean(read(x_in.at[wg]), parity)
        x16.at[wg][...] = (x * by_row(inverse_norm(slot)) if normalize_qk else x).astype(f16)

    def pair_gradient(job, parity):
        """The gradient of Aqk (job 0) or L (job 1), lower triangle as it is, upper transposed, ready for both uses."""
        row, column = indices()
        zero = hidden_zero()
        pairs = [(pair16.at[job, i + zero], r_s.at[i + zero]) for i in wgs]
        lower, upper = _products([(x, v.T) for x, v in pairs], [(v, x.T) for x, v in pairs], shape=(C, C))
        of_l = jnp.int32(job).astype(f32)  # 0.0 or 1.0
        low = (1.0 - of_l) * scale - of_l
        high = (1.0 - of_l) * scale - of_l * beta_columns(parity)
        diagonal = jnp.sum(lower * between(column, row - 1, row).astype(f32), 1) * scale

        @pl.when(of_l == 0.0)
        def _():
            diagonal_s()[...] = diagonal

        below = between(column, row * 0 - 1, row - 1)
        return (lower * low).astype(f16) * below + (upper * high).astype(f16) * (f16(1) - below)

    def boundary_terms():
        """The state's part of the gradient by the last key's decay; the part of the keys that carries -G."""
        wg, (row, column) = here(), indices()
        values = [pl.ds(i * SLAB, SLAB) for i in wgs]
        states = sum(read(h_s.at[wg, x]) * read(ds_s.at[wg, x]) for x in values)
        boundary = by_column(plgpu.load(slot_s(GAMMA, wg), layout=COL)) * states
        to_exit, down = _products(
            [(between(column, row, row * 0 + C), g2_s.at[wg])],
            [(r_s.at[i + wg - own], ds_s.at[wg, x]) for i, x in enumerate(values)],
        )
        down = jnp.exp2(to_exit) * down
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dv has left the work tiles
        meet()
        tiles = split(boundary + read(k16.at[wg]) * down)
        plgpu.commit_smem()
        slot_s(BOUNDARY, wg)[...] = column_sums(*tiles)
        return down

    def entry_terms():
        """What reaches the queries and keys from the state entering the chunk."""
        wg, (row, column) = here(), indices()
        values = [pl.ds(i * SLAB, SLAB) for i in wgs]
        from_entry, dq = _products(
            [(between(column, row * 0 - 1, row), g2_s.at[wg])],
            [(pair16.at[0, i + wg - own], h_s.at[wg, x]) for i, x in enumerate(values)],
        )
        from_entry = jnp.exp2(from_entry)
        dq = (from_entry * scale) * dq
        (up,) = _products([(pair16.at[1, i + wg - own], h_s.at[wg, x]) for i, x in enumerate(values)])
        up = -from_entry * up
        overlap = plgpu.load(slot_s(DBETA, wg), layout=ROW)
        slot_s(DBETA, wg)[...] = overlap - jnp.sum(read(k16.at[wg]) * up, 1)
        return dq, up

    def level(n, carry):
        dq, up, down = carry
        wg = here()
        sums, second, pair = _level_masks(n, *indices())
        of_level = lambda: [plgpu.load(r_s.at[wg - own + i], layout=W) * pair for i in range(2)]
        exponent, of_a, of_l = _products([(sums, g2_s.at[wg])], meanwhile=of_level)
        factor = jnp.exp2(exponent).astype(f16)
        second_factor = factor * second
        first_factor = factor - second_factor
        kn, qn = plgpu.load(k16.at[wg], layout=W), plgpu.load(q16.at[wg], layout=W)
        work16.at[wg, 0][...] = kn * factor
        work16.at[wg, 1][...] = kn * first_factor + qn * second_factor
        plgpu.commit_smem()
        by_a, by_l = _products([(of_a, work16.at[wg, 1])], [(of_l, work16.at[wg, 0])])
        meet()  # the next level overwrites what these products read
        second_factor, first_factor = second_factor.astype(f32), first_factor.astype(f32)
        return dq + second_factor * by_a, up + second_factor * by_l, down + first_factor * (by_a + by_l)

    def finish(c, following, parity, dq, up, down):
        wg = here()
        b, n, h, bh, rows = where(c)
        diagonal = by_row(plgpu.load(diagonal_s(), layout=ROW))
        qn, kn = read(q16.at[wg]), read(k16.at[wg])
        dq, down = dq + diagonal * kn, down + diagonal * qn
        slot_s(DBETA, wg)[...] = plgpu.load(slot_s(DBETA, wg), layout=ROW) + jnp.sum(kn * up, 1)
        dg_rows = qn * dq
        slot_s(Q_DOT, wg)[...] = jnp.sum(dg_rows, 1)
        up = by_row(row_weight(BETA, parity)) * up
        dg_rows = dg_rows + kn * (up - down)
        dk = up + down
        slot_s(K_DOT, wg)[...] = jnp.sum(kn * dk, 1)
        tiles = split(dg_rows)
        sync(3)
        pl.when(following < total)(lambda: load_r(following))
        unscale = row_weight(UNSCALE, parity)
        for x16, x_out, dx, square, dot in ((q16, q_in, dq, Q_SQUARE, Q_DOT), (k16, k_in, dk, K_SQUARE, K_DOT)):
            if normalize_qk:
                dx = by_row(inverse_norm(square)) * (dx - read(x16.at[wg]) * by_row(total_over_wgs(dot)))
            x_out.at[wg][...] = (dx * by_row(unscale)).astype(x_out.dtype)
        wg, (row, column) = here(), indices()
        later = between(column, row - 1, row * 0 + C).astype(f32).astype(bf16)
        (dg,) = _products([(later, x) for x in tiles])
        dg = (dg + by_column(plgpu.load(slot_s(BOUNDARY, wg), layout=COL))) * by_row(row_weight(DG_UNSCALE, parity))
        if kind.raw:
            _, slope, rate_gradient = gate(parity)
            draw = dg * slope()
            pair_of_rows(SUMS, wg).at[0][...] = jnp.sum(rate_gradient(dg, draw), 1)
        else:
            draw = dg
        draw_s.at[wg][...] = draw.astype(draw_s.dtype)
        if kind.raw:
            meet()
            tiles = split(draw)
            plgpu.commit_smem()
            pair_of_rows(SUMS, wg).at[1][...] = column_sums(*tiles)
        slot_s(DBETA_TOTAL, wg)[...] = total_over_wgs(DBETA) * row_weight(UNSCALE, parity)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_in.at[wg], dq_o.at[b, rows, h, slab])
        plgpu.copy_smem_to_gmem(k_in.at[wg], dk_o.at[b, rows, h, slab])
        plgpu.copy_smem_to_gmem(draw_s.at[wg], draw_o.at[b, rows, h, slab])
        if kind.raw:
            plgpu.copy_smem_to_gmem(pair_of_rows(SUMS, own), sums_o.at[bh, n, wg])
        only(0, lambda: plgpu.copy_smem_to_gmem(slot_s(DBETA_TOTAL, 0), dbeta_o.at[bh, n]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sync(4)  # before the next chunk overwrites the sums that the warpgroups exchanged
        pl.when(following < total)(lambda: load_inputs(following))

    def chunk(i, _):
        c, parity = first + i * num_ctas, lax.rem(i, 2)
        following = c + num_ctas
        plgpu.barrier_wait(early_bar)
        plgpu.barrier_wait(r_bar)
        new_values(c, parity)
        plgpu.barrier_wait(inputs_bar.at[own])
        prepare_inputs(parity)
        sync(0)
        normalize(Q_SQUARE, q_in, q16, parity)
        normalize(K_SQUARE, k_in, k16, parity)
        pair_gradients = [pair_gradient(job, parity) for job in jobs]
        down = boundary_terms()
        dq, up = entry_terms()
        sync(1)
        pl.when(following < total)(lambda: load_early(following, 1 - parity))
        for job, x in zip(jobs, pair_gradients, strict=True):
            r_s.at[job][...] = x
        sync(2)
        finish(c, following, parity, *lax.fori_loop(0, LEVELS, level, (dq, up, down)))
        return ()

    @functools.partial(only, 0)
    def _():
        plgpu.copy_gmem_to_smem(ones_g, ones_s, ones_bar)
        plgpu.copy_gmem_to_smem(numbers_g, vector_s.at[2 * NUM_WEIGHTS + NUM_SLOTS * num_wgs + 1], ones_bar)

    plgpu.barrier_wait(ones_bar)
    load_early(first, 0)
    load_r(first)
    load_inputs(first)
    lax.fori_loop(0, lax.div(total - first + num_ctas - 1, num_ctas), chunk, ())
    plgpu.wait_smem_to_gmem(0)


def chunk_gradients(q, k, raw, do, p, r, h, ds, t, gamma, weight, par, *, kind, scale, normalize_qk, packed):
    """See `mirror_vjp.chunk_gradients`; everything in the callers' layout, per-token weights and gate packed.

    Args:
      q, k [B,T,H,K], raw [B,T,HV,K], do [B,T,HV,V]: bfloat16 or float16 (raw in base 2, float16, without a gate).
      p, r [B*HV,NT,C,V], h, ds [B*HV,NT,V,K], t [B*HV,NT,C,C]: float16; gamma [B*HV,NT,K]: float32.
      weight [B*HV,NT,5,C]: beta, scale of do, its reciprocal for outputs, for the gate, and the token's code.
      par [HV,2,K]: dt_bias in base 2, rate.

    Returns:
      dq, dk, draw [B,T,HV,K], dv [B,T,HV,V], dbeta [B*HV,NT,C], sums [B*HV,NT,num_wgs,2,64] (rate, bias).
    """
    B, T, H, K = q.shape
    HV, V = do.shape[2:]
    NT, heads, num_wgs = T // C, B * HV, K // SLAB
    assert K == V and K % SLAB == 0 and num_wgs <= 2 and T % C == 0
    draw_dtype, out = raw.dtype if kind.raw else bf16, jax.ShapeDtypeStruct
    launch = plgpu.kernel(
        functools.partial(
            _chunk_kernel, sizes=(B, NT, H, HV, num_wgs), kind=kind, scale=scale, normalize_qk=normalize_qk,
            packed=packed,
        ),
        out_type=(
            out((B, T, HV, K), q.dtype), out((B, T, HV, K), q.dtype), out((B, T, HV, V), do.dtype),
            out((B, T, HV, K), draw_dtype), out((heads, NT, C), f32), out((heads, NT, num_wgs, 2, SLAB), f32),
        ),
        grid=(min(NUM_CTAS, B * NT * HV),),
        grid_names=("cta",),
        num_threads=num_wgs,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        scratch_types=[
            _union(num_wgs, C, SLAB, dtypes=(q.dtype, f16)), _union(num_wgs, C, SLAB, dtypes=(k.dtype, f16)),
            _union(num_wgs, C, SLAB, dtypes=(raw.dtype, draw_dtype)), tile(num_wgs, C, SLAB),
            _union(2, num_wgs, C, SLAB, dtypes=(do.dtype, f16)), tile(2, C, SLAB),
            tile(num_wgs, V, SLAB), tile(num_wgs, V, SLAB), tile(1, C, C),
            _union(num_wgs, 2, C, SLAB, dtypes=(do.dtype, f16, bf16)), tile(8, SLAB, dtype=bf16),
            plgpu.SMEM((2 * NUM_WEIGHTS + NUM_SLOTS * num_wgs + 2, SLAB), f32),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=4 * num_wgs + 2),
            plgpu.Barrier(num_arrivals=num_wgs), plgpu.Barrier(num_arrivals=5, num_barriers=num_wgs),
            plgpu.Barrier(num_arrivals=num_wgs, num_barriers=5),
        ],
    )  # fmt: skip
    ones = jnp.ones((8, SLAB), bf16)
    gamma = gamma.reshape(heads, NT, num_wgs, SLAB)
    par = jnp.swapaxes(par.reshape(HV, 2, num_wgs, SLAB), 1, 2)
    return launch(q, k, raw, do, p, r, h, ds, t, gamma, weight, par, ones, jnp.arange(C, dtype=f32))


# ------------------------------------------------------------------------------------------------------ whole backward


def backward(q, k, g, beta, code, gate: Gate, prepared, h, r, do, dfinal, *, scale, normalize_qk) -> Gradients:
    """Gradients of `chunk_kda` from what its forward kept.

    Args:
      q, k, g, beta, code, gate: as in `prepare_mosaic_gpu.prepare`, which returned `prepared`.
      h, r: what the forward recurrence kept: the states entering the chunks, and V - Kg S.
      do: cotangent of o, bfloat16 or float16, anything at padding; dfinal: of the final state, float32.

    The gradient of a float32 g is rounded to bfloat16.
    """
    B, T, H, K = q.shape
    HV = g.shape[2]
    NT, heads = T // C, B * HV
    padding = None if code is None else (code == PADDING)
    size = cotangent_scale(do, dfinal, None if code is None else padding.reshape(B, T))
    weight = _token_weights(beta, code, size)
    merge = lambda x: x.reshape(heads, *x.shape[2:])
    ds, p, dinitial = reverse_chain(*prepared, beta, weight[:, :, DO_SCALE], do, merge(dfinal * size[:, :, None, None]))
    fused = gate is not None and g.dtype != f32
    raw = g if fused else _base2(g if gate is None else gate.log_decay(g))
    kind = _GateKind(fused, gate.bound if isinstance(gate, LowerBoundGate) else None)
    dq, dk, dv, dg, dbeta, sums = chunk_gradients(
        *(q, k, raw, do, p, r, h, ds, prepared.t, prepared.gamma, weight, _gate_parameters(gate, HV, K)),
        **dict(kind=kind, scale=scale, normalize_qk=normalize_qk, packed=code is not None),
    )
    da_log = ddt_bias = None
    if fused:
        sums = sums.reshape(B, HV, NT, K // SLAB, 2, SLAB).sum((0, 2))
        da_log, ddt_bias = sums[:, :, 0].sum((1, 2)), sums[:, :, 1].reshape(HV, K)
    elif gate is not None:
        clean = g if code is None else jnp.where(padding.reshape(B, T, 1, 1), 0, g)
        _, pull = jax.vjp(lambda raw, gate: gate.log_decay(raw), clean, gate)
        dg, dgate = pull(dg.astype(f32))
        da_log, ddt_bias = dgate.a_log, dgate.dt_bias
    of_head = lambda x: x.reshape(B, T, H, HV // H, K).astype(f32).sum(3).astype(x.dtype) if HV != H else x
    dinitial = dinitial.reshape(B, HV, *dinitial.shape[1:]) / size[:, :, None, None]
    if getattr(gate, "a_log", None) is None:
        da_log = None
    return Gradients(of_head(dq), of_head(dk), dv, dg.astype(g.dtype), dbeta, da_log, ddt_bias, dinitial)


def _token_weights(beta, code, size):
    """[B*HV, NT, 5, C] float32: beta, scale of do (0 at padding), its inverse for outputs and for dg, the code."""
    heads, _, _ = beta.shape
    size = jnp.broadcast_to(size.reshape(heads, 1, 1), beta.shape)
    if code is None:
        return jnp.stack([beta, size, 1 / size, 1 / size, jnp.zeros_like(beta)], 2)
    code = jnp.repeat(code, heads // code.shape[0], axis=0)
    token, ordinary = code != PADDING, code == 0
    keep = lambda mask, x: jnp.where(mask, x, 0.0)
    return jnp.stack([beta, keep(token, size), keep(token, 1 / size), keep(ordinary, 1 / size), code.astype(f32)], 2)


def _base2(g):
    return jnp.maximum(g * LOG2E, FORGET).astype(f16)


def _gate_parameters(gate: Gate, HV: int, K: int):
    """dt_bias in base 2 and exp(a_log) per channel, [HV, 2, K]."""
    if gate is None:
        return jnp.zeros((HV, 2, K), f32)
    rate = jnp.ones((HV,), f32) if gate.a_log is None else jnp.exp(gate.a_log.astype(f32))
    return jnp.stack([gate.dt_bias.astype(f32) * LOG2E, jnp.broadcast_to(rate[:, None], (HV, K))], 1)
