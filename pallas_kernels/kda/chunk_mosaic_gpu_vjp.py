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


def _read(ref):
    return plgpu.load(ref, layout=W).astype(f32)


class _Chunks:
    """The chunk kernel: one persistent CTA. Warpgroup wg owns 64 key columns (and 64 value columns) of every chunk.

    What the next chunk needs is loaded as soon as its buffer is free: `early` (cotangents, states) before the level
    loop, which hides it; r after that loop; q, k and the gate at the end.
    """

    def __init__(
        self,
        *refs,
        sizes: tuple[int, int, int, int, int],
        kind: _GateKind,
        scale: float,
        normalize_qk: bool,
        packed: bool,
    ):
        inputs, outputs, scratch = refs[:14], refs[14:20], refs[20:]
        self.q_g, self.k_g, self.raw_g, self.do_g, self.p_g, self.r_g, self.h_g, self.ds_g, *inputs = inputs
        self.t_g, self.gamma_g, self.weight_g, self.par_g, self.ones_g, self.numbers_g = inputs
        self.dq_o, self.dk_o, self.dv_o, self.draw_o, self.dbeta_o, self.sums_o = outputs
        q_s, k_s, raw_s, self.g2_s, pair_s, self.r_s, self.h_s, self.ds_s, self.t_s, work_s, *scratch = scratch
        self.ones_s, self.vector_s, *barriers = scratch
        self.ones_bar, self.early_bar, self.r_bar, self.inputs_bar, self.sync_bar = barriers
        self.q_in, self.k_in, self.pair_in = (
            _view(union, ref.dtype) for union, ref in ((q_s, self.q_g), (k_s, self.k_g), (pair_s, self.do_g))
        )
        self.q16, self.k16, self.pair16, self.work16 = (_view(union, f16) for union in (q_s, k_s, pair_s, work_s))
        self.work_in, self.work_b = _view(work_s, self.do_g.dtype), _view(work_s, bf16)
        self.raw_in, self.draw_s = _view(raw_s, self.raw_g.dtype), _view(raw_s, self.draw_o.dtype)
        self.kind, self.scale, self.normalize_qk, self.packed = kind, scale, normalize_qk, packed
        self.B, self.NT, self.H, self.HV, self.num_wgs = sizes
        self.wgs = range(self.num_wgs)
        self.own, self.first = lax.axis_index("wg"), lax.axis_index("cta")
        self.jobs = [self.own] if self.num_wgs == 2 else [0, 1]  # the gradients of Aqk and L: one per warpgroup
        self.total = self.B * self.NT * self.HV
        self.num_ctas = min(NUM_CTAS, self.total)
        self.slab = pl.ds(self.own * SLAB, SLAB)

    def here(self):
        """The warpgroup's own number, to be asked for anew in every stage; see `hidden_zero`."""
        return self.own + hidden_zero()

    def indices(self):
        """(row numbers [C], int32; column numbers [C, C], float16), read from memory: constants would be hoisted."""
        numbers = self.vector_s.at[2 * NUM_WEIGHTS + NUM_SLOTS * self.num_wgs + 1 + hidden_zero()]
        column = plgpu.load(numbers, layout=COL).astype(f16)
        row = plgpu.broadcasted_iota(i32, (C,), 0, layout=ROW) + hidden_zero()
        return row, by_column(column)

    def where(self, c):
        h, rest = lax.rem(c, self.HV), lax.div(c, self.HV)
        n, b = lax.rem(rest, self.NT), lax.div(rest, self.NT)
        return b, n, h, b * self.HV + h, pl.ds(n * C, C)

    def only(self, which, f):
        f() if self.num_wgs == 1 else pl.when(self.own == which)(f)

    def load_early(self, c, parity):
        wg = self.own
        b, n, h, bh, rows = self.where(c)
        plgpu.copy_gmem_to_smem(self.do_g.at[b, rows, h, self.slab], self.pair_in.at[0, wg], self.early_bar)
        plgpu.copy_gmem_to_smem(self.p_g.at[bh, n, :, self.slab], self.pair16.at[1, wg], self.early_bar)
        plgpu.copy_gmem_to_smem(self.h_g.at[bh, n, :, self.slab], self.h_s.at[wg], self.early_bar)
        plgpu.copy_gmem_to_smem(self.ds_g.at[bh, n, :, self.slab], self.ds_s.at[wg], self.early_bar)

        @functools.partial(self.only, 0)
        def _():
            plgpu.copy_gmem_to_smem(self.t_g.at[bh, n], self.t_s.at[0], self.early_bar)
            weights = self.vector_s.at[pl.ds(parity * NUM_WEIGHTS, NUM_WEIGHTS)]
            plgpu.copy_gmem_to_smem(self.weight_g.at[bh, n], weights, self.early_bar)

    def load_r(self, c):
        wg = self.own
        _, n, _, bh, _ = self.where(c)
        plgpu.copy_gmem_to_smem(self.r_g.at[bh, n, :, self.slab], self.r_s.at[wg], self.r_bar)

    def load_inputs(self, c):
        wg = self.own
        b, n, h, bh, rows = self.where(c)
        head = h if self.H == self.HV else lax.div(h, self.HV // self.H)
        plgpu.copy_gmem_to_smem(self.q_g.at[b, rows, head, self.slab], self.q_in.at[wg], self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.k_g.at[b, rows, head, self.slab], self.k_in.at[wg], self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.raw_g.at[b, rows, h, self.slab], self.raw_in.at[wg], self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.gamma_g.at[bh, n, wg], self.slot_s(GAMMA, wg), self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.par_g.at[h, wg], self.pair_of_rows(PAR, wg), self.inputs_bar.at[wg])

    def sync(self, i):
        """Every warpgroup has done what precedes, and its writes are seen by all, the copy engine included."""
        plgpu.commit_smem()
        if self.num_wgs == 2:
            plgpu.barrier_arrive(self.sync_bar.at[i])
            plgpu.barrier_wait(self.sync_bar.at[i])

    def column_sums(self, *tiles):
        """Sums over rows of committed tiles, one number per column: eight equal columns of a product with ones."""
        (sums,) = _products([(x.T, self.ones_s.T) for x in tiles], shape=(SLAB, 8))
        return jnp.max(sums, 1)

    def split(self, x):
        """x in two bfloat16 tiles: 16 bits of it."""
        wg = self.here()
        high = x.astype(bf16)
        self.work_b.at[wg, 0][...] = high
        self.work_b.at[wg, 1][...] = (x - high.astype(f32)).astype(bf16)
        return self.work_b.at[wg, 0], self.work_b.at[wg, 1]

    def slot_s(self, slot, i):
        return self.vector_s.at[2 * NUM_WEIGHTS + slot * self.num_wgs + i]

    def pair_of_rows(self, slot, wg):
        return self.vector_s.at[pl.ds(2 * NUM_WEIGHTS + slot * self.num_wgs + 2 * wg, 2)]

    def diagonal_s(self):
        return self.slot_s(NUM_SLOTS, hidden_zero())

    def row_weight(self, i, parity):
        return plgpu.load(self.vector_s.at[parity * NUM_WEIGHTS + i], layout=ROW)

    def beta_columns(self, parity):
        return by_column(plgpu.load(self.vector_s.at[parity * NUM_WEIGHTS + BETA], layout=COL))

    def total_over_wgs(self, slot):
        return sum(plgpu.load(self.slot_s(slot, i + hidden_zero()), layout=ROW) for i in self.wgs)

    def inverse_norm(self, slot):
        return lax.rsqrt(self.total_over_wgs(slot) + L2_EPS)

    def clean(self, x, parity):
        """Zero in place of padding, which may hold anything."""
        return jnp.where(by_row(self.row_weight(CODE, parity)) > 1.5, 0.0, x) if self.packed else x

    def gate(self, parity):
        wg = self.here()
        bias2, rate = (by_column(plgpu.load(self.pair_of_rows(PAR, wg).at[i], layout=COL)) for i in range(2))
        return _gate(self.kind, self.clean(_read(self.raw_in.at[wg]), parity), bias2, rate)

    def new_values(self, c, parity):
        """Vn in place of r, do scaled in place, dv, and the part of dbeta that comes through r."""
        wg = self.here()
        b, _, h, _, rows = self.where(c)
        do_scale = by_row(self.row_weight(DO_SCALE, parity))
        do = _read(self.pair_in.at[0, wg]) * do_scale
        self.pair16.at[0, wg][...] = (jnp.where(do_scale > 0.0, do, 0.0) if self.packed else do).astype(f16)
        p = _read(self.pair16.at[1, wg])
        self.slot_s(DBETA, wg)[...] = jnp.sum(p * _read(self.r_s.at[wg]), 1)
        self.work_in.at[wg, 0][...] = (
            p * by_row(self.row_weight(BETA, parity) * self.row_weight(UNSCALE, parity))
        ).astype(self.work_in.dtype)
        t_beta = _read(self.t_s.at[wg - self.own]) * self.beta_columns(parity)
        (vn,) = _products([(t_beta.astype(f16), self.r_s.at[wg])])
        plgpu.commit_smem()
        self.r_s.at[wg][...] = vn.astype(f16)
        plgpu.copy_smem_to_gmem(self.work_in.at[wg, 0], self.dv_o.at[b, rows, h, self.slab])

    def prepare_inputs(self, parity):
        """The gate in base 2, and this warpgroup's part of the squared norms."""
        wg = self.here()
        g2 = (
            jnp.maximum(self.gate(parity)[0], FORGET)
            if self.kind.raw
            else self.clean(_read(self.raw_in.at[wg]), parity)
        )
        if self.packed:
            code = by_row(self.row_weight(CODE, parity))
            g2 = jnp.where(code > 0.5, jnp.where(code > 1.5, 0.0, FORGET), g2)
        self.g2_s.at[wg][...] = g2.astype(f16)
        for slot, ref in ((Q_SQUARE, self.q_in), (K_SQUARE, self.k_in)):
            x = self.clean(_read(ref.at[wg]), parity)
            self.slot_s(slot, wg)[...] = jnp.sum(x * x, 1)

    def normalize(self, slot, x_in, x16, parity):
        wg = self.here()
        x = self.clean(_read(x_in.at[wg]), parity)
        x16.at[wg][...] = (x * by_row(self.inverse_norm(slot)) if self.normalize_qk else x).astype(f16)

    def pair_gradient(self, job, parity):
        """The gradient of Aqk (job 0) or L (job 1), lower triangle as it is, upper transposed, ready for both uses."""
        row, column = self.indices()
        zero = hidden_zero()
        pairs = [(self.pair16.at[job, i + zero], self.r_s.at[i + zero]) for i in self.wgs]
        lower, upper = _products([(x, v.T) for x, v in pairs], [(v, x.T) for x, v in pairs], shape=(C, C))
        of_l = jnp.int32(job).astype(f32)  # 0.0 or 1.0
        low = (1.0 - of_l) * self.scale - of_l
        high = (1.0 - of_l) * self.scale - of_l * self.beta_columns(parity)
        diagonal = jnp.sum(lower * between(column, row - 1, row).astype(f32), 1) * self.scale

        @pl.when(of_l == 0.0)
        def _():
            self.diagonal_s()[...] = diagonal

        below = between(column, row * 0 - 1, row - 1)
        return (lower * low).astype(f16) * below + (upper * high).astype(f16) * (f16(1) - below)

    def boundary_terms(self):
        """The state's part of the gradient by the last key's decay; the part of the keys that carries -G."""
        wg, (row, column) = self.here(), self.indices()
        values = [pl.ds(i * SLAB, SLAB) for i in self.wgs]
        states = sum(_read(self.h_s.at[wg, x]) * _read(self.ds_s.at[wg, x]) for x in values)
        boundary = by_column(plgpu.load(self.slot_s(GAMMA, wg), layout=COL)) * states
        to_exit, down = _products(
            [(between(column, row, row * 0 + C), self.g2_s.at[wg])],
            [(self.r_s.at[i + wg - self.own], self.ds_s.at[wg, x]) for i, x in enumerate(values)],
        )
        down = jnp.exp2(to_exit) * down
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dv has left the work tiles
        meet()
        tiles = self.split(boundary + _read(self.k16.at[wg]) * down)
        plgpu.commit_smem()
        self.slot_s(BOUNDARY, wg)[...] = self.column_sums(*tiles)
        return down

    def entry_terms(self):
        """What reaches the queries and keys from the state entering the chunk."""
        wg, (row, column) = self.here(), self.indices()
        values = [pl.ds(i * SLAB, SLAB) for i in self.wgs]
        from_entry, dq = _products(
            [(between(column, row * 0 - 1, row), self.g2_s.at[wg])],
            [(self.pair16.at[0, i + wg - self.own], self.h_s.at[wg, x]) for i, x in enumerate(values)],
        )
        from_entry = jnp.exp2(from_entry)
        dq = (from_entry * self.scale) * dq
        (up,) = _products([(self.pair16.at[1, i + wg - self.own], self.h_s.at[wg, x]) for i, x in enumerate(values)])
        up = -from_entry * up
        overlap = plgpu.load(self.slot_s(DBETA, wg), layout=ROW)
        self.slot_s(DBETA, wg)[...] = overlap - jnp.sum(_read(self.k16.at[wg]) * up, 1)
        return dq, up

    def level(self, n, carry):
        dq, up, down = carry
        wg = self.here()
        sums, second, pair = _level_masks(n, *self.indices())
        of_level = lambda: [plgpu.load(self.r_s.at[wg - self.own + i], layout=W) * pair for i in range(2)]
        exponent, of_a, of_l = _products([(sums, self.g2_s.at[wg])], meanwhile=of_level)
        factor = jnp.exp2(exponent).astype(f16)
        second_factor = factor * second
        first_factor = factor - second_factor
        kn, qn = plgpu.load(self.k16.at[wg], layout=W), plgpu.load(self.q16.at[wg], layout=W)
        self.work16.at[wg, 0][...] = kn * factor
        self.work16.at[wg, 1][...] = kn * first_factor + qn * second_factor
        plgpu.commit_smem()
        by_a, by_l = _products([(of_a, self.work16.at[wg, 1])], [(of_l, self.work16.at[wg, 0])])
        meet()  # the next level overwrites what these products read
        second_factor, first_factor = second_factor.astype(f32), first_factor.astype(f32)
        return dq + second_factor * by_a, up + second_factor * by_l, down + first_factor * (by_a + by_l)

    def finish(self, c, following, parity, dq, up, down):
        wg = self.here()
        b, n, h, bh, rows = self.where(c)
        diagonal = by_row(plgpu.load(self.diagonal_s(), layout=ROW))
        qn, kn = _read(self.q16.at[wg]), _read(self.k16.at[wg])
        dq, down = dq + diagonal * kn, down + diagonal * qn
        self.slot_s(DBETA, wg)[...] = plgpu.load(self.slot_s(DBETA, wg), layout=ROW) + jnp.sum(kn * up, 1)
        dg_rows = qn * dq
        self.slot_s(Q_DOT, wg)[...] = jnp.sum(dg_rows, 1)
        up = by_row(self.row_weight(BETA, parity)) * up
        dg_rows = dg_rows + kn * (up - down)
        dk = up + down
        self.slot_s(K_DOT, wg)[...] = jnp.sum(kn * dk, 1)
        tiles = self.split(dg_rows)
        self.sync(3)
        pl.when(following < self.total)(lambda: self.load_r(following))
        unscale = self.row_weight(UNSCALE, parity)
        for x16, x_out, dx, square, dot in (
            (self.q16, self.q_in, dq, Q_SQUARE, Q_DOT),
            (self.k16, self.k_in, dk, K_SQUARE, K_DOT),
        ):
            if self.normalize_qk:
                dx = by_row(self.inverse_norm(square)) * (dx - _read(x16.at[wg]) * by_row(self.total_over_wgs(dot)))
            x_out.at[wg][...] = (dx * by_row(unscale)).astype(x_out.dtype)
        wg, (row, column) = self.here(), self.indices()
        later = between(column, row - 1, row * 0 + C).astype(f32).astype(bf16)
        (dg,) = _products([(later, x) for x in tiles])
        dg = (dg + by_column(plgpu.load(self.slot_s(BOUNDARY, wg), layout=COL))) * by_row(
            self.row_weight(DG_UNSCALE, parity)
        )
        if self.kind.raw:
            _, slope, rate_gradient = self.gate(parity)
            draw = dg * slope()
            self.pair_of_rows(SUMS, wg).at[0][...] = jnp.sum(rate_gradient(dg, draw), 1)
        else:
            draw = dg
        self.draw_s.at[wg][...] = draw.astype(self.draw_s.dtype)
        if self.kind.raw:
            meet()
            tiles = self.split(draw)
            plgpu.commit_smem()
            self.pair_of_rows(SUMS, wg).at[1][...] = self.column_sums(*tiles)
        self.slot_s(DBETA_TOTAL, wg)[...] = self.total_over_wgs(DBETA) * self.row_weight(UNSCALE, parity)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.q_in.at[wg], self.dq_o.at[b, rows, h, self.slab])
        plgpu.copy_smem_to_gmem(self.k_in.at[wg], self.dk_o.at[b, rows, h, self.slab])
        plgpu.copy_smem_to_gmem(self.draw_s.at[wg], self.draw_o.at[b, rows, h, self.slab])
        if self.kind.raw:
            plgpu.copy_smem_to_gmem(self.pair_of_rows(SUMS, self.own), self.sums_o.at[bh, n, wg])
        self.only(0, lambda: plgpu.copy_smem_to_gmem(self.slot_s(DBETA_TOTAL, 0), self.dbeta_o.at[bh, n]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.sync(4)  # before the next chunk overwrites the sums that the warpgroups exchanged
        pl.when(following < self.total)(lambda: self.load_inputs(following))

    def chunk(self, i, _):
        c, parity = self.first + i * self.num_ctas, lax.rem(i, 2)
        following = c + self.num_ctas
        plgpu.barrier_wait(self.early_bar)
        plgpu.barrier_wait(self.r_bar)
        self.new_values(c, parity)
        plgpu.barrier_wait(self.inputs_bar.at[self.own])
        self.prepare_inputs(parity)
        self.sync(0)
        self.normalize(Q_SQUARE, self.q_in, self.q16, parity)
        self.normalize(K_SQUARE, self.k_in, self.k16, parity)
        pair_gradients = [self.pair_gradient(job, parity) for job in self.jobs]
        down = self.boundary_terms()
        dq, up = self.entry_terms()
        self.sync(1)
        pl.when(following < self.total)(lambda: self.load_early(following, 1 - parity))
        for job, x in zip(self.jobs, pair_gradients, strict=True):
            self.r_s.at[job][...] = x
        self.sync(2)
        self.finish(c, following, parity, *lax.fori_loop(0, LEVELS, self.level, (dq, up, down)))
        return ()

    def run(self):
        """Visits the CTA's chunks."""

        @functools.partial(self.only, 0)
        def _():
            plgpu.copy_gmem_to_smem(self.ones_g, self.ones_s, self.ones_bar)
            plgpu.copy_gmem_to_smem(
                self.numbers_g, self.vector_s.at[2 * NUM_WEIGHTS + NUM_SLOTS * self.num_wgs + 1], self.ones_bar
            )

        plgpu.barrier_wait(self.ones_bar)
        self.load_early(self.first, 0)
        self.load_r(self.first)
        self.load_inputs(self.first)
        lax.fori_loop(0, lax.div(self.total - self.first + self.num_ctas - 1, self.num_ctas), self.chunk, ())
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
    settings = dict(kind=kind, scale=scale, normalize_qk=normalize_qk, packed=packed)

    def kernel(*refs):
        _Chunks(*refs, sizes=(B, NT, H, HV, num_wgs), **settings).run()

    launch = plgpu.kernel(
        kernel,
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
    return jnp.maximum(g.astype(f32) * LOG2E, FORGET).astype(f16)  # as the forward kernel rounds it


def _gate_parameters(gate: Gate, HV: int, K: int):
    """dt_bias in base 2 and exp(a_log) per channel, [HV, 2, K]."""
    if gate is None:
        return jnp.zeros((HV, 2, K), f32)
    rate = jnp.ones((HV,), f32) if gate.a_log is None else jnp.exp(gate.a_log.astype(f32))
    return jnp.stack([gate.dt_bias.astype(f32) * LOG2E, jnp.broadcast_to(rate[:, None], (HV, K))], 1)
