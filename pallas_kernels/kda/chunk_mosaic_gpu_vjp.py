"""Backward of KDA on Hopper, second kernel: all gradients of a chunk from its states, chunks in parallel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.kda.gates import Gate, LowerBoundGate, log_decay_of_rows
from pallas_kernels.kda.mirror_vjp import LN2, Gradients
from pallas_kernels.kda.prepare_mosaic_gpu import (
    FINE,
    FORGET,
    LEVELS,
    LOG2E,
    PADDING,
    RESET,
    C,
    by_column,
    by_row,
    hidden_zero,
    meet,
    products,
    tile,
)
from pallas_kernels.kda.reference import L2_EPS
from pallas_kernels.kda.segments_mosaic_gpu import recur_back
from pallas_kernels.kda.warp_mosaic_gpu_vjp import (
    PART,
    add_column_sums,
    add_level,
    by_block,
    column_sums,
    cut,
    fast_exp2,
    fast_log2,
    fast_rsqrt,
    fine_levels,
    fine_tables,
    fold,
    join,
    later_in_document,
    level_pairs,
    level_triangle,
    store_diagonal,
    triangle,
)

W = plgpu.Layout.WGMMA
ROW, COL = W.reduce(1), W.reduce(0)  # layouts of one value per row, per column
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32
SLAB = 64  # columns that one warpgroup owns


def _union(*shape, dtypes):
    """A tile seen through several dtypes; see `_view`."""
    return plgpu.RefUnion(*(tile(*shape, dtype=dtype) for dtype in dict.fromkeys(map(jnp.dtype, dtypes))))


def _view(union, dtype):
    return next(ref for ref in union if ref.dtype == dtype)


class _GateKind(NamedTuple):
    """What the kernel must know of a gate when it is built; `bound` is None for the softplus gate."""

    raw: bool  # False: the input is the log-decay itself, already float16 in base 2
    bound: float | None = None


def _log2_decay(kind: _GateKind, raw, bias2, rate):
    """The base-2 log-decay of raw logits."""
    z2 = raw * LOG2E + bias2
    if kind.bound is None:
        return -rate * (jnp.maximum(z2, 0.0) + fast_log2(1.0 + fast_exp2(-jnp.abs(z2))))
    root = fast_rsqrt(1.0 + fast_exp2(-rate * z2))  # 1 / (1 + x) as a squared rsqrt: no division
    return (kind.bound * LOG2E) * (root * root)


def _slope(kind: _GateKind, raw, bias2, rate):
    """(slope of the log-decay in nats by the logit, the logit)."""
    z2 = raw * LOG2E + bias2
    if kind.bound is None:
        root = fast_rsqrt(1.0 + fast_exp2(-z2))
        return -rate * (root * root), z2
    root = fast_rsqrt(1.0 + fast_exp2(-rate * z2))
    s = root * root
    return (kind.bound * rate) * (s - s * s), z2


# Rows of the per-token weights.
BETA, DO_SCALE, UNSCALE, CODE = range(4)
NUM_WEIGHTS = 4
# Rows of 64 numbers, one per token: the weights of two chunks, then these; the last four for each warpgroup.
RSTD_Q, RSTD_K, DIAGONAL, _, DBETA_TOTAL = range(2 * NUM_WEIGHTS, 2 * NUM_WEIGHTS + 5)
Q_SUM, K_SUM, DBETA, RATE = range(4)
PER_TOKEN, PER_WG = DBETA_TOTAL + 1, 4
# Rows of 64 numbers for each warpgroup, one per column; four for sums over the rows of each warp.
GAMMA, BIAS, SLOPE, PARTIAL = range(4)
PER_COLUMN = PARTIAL + 4


def _read(ref):
    return plgpu.load(ref, layout=W).astype(f32)


class _Chunks:
    """The kernel: one persistent CTA. Warpgroup wg owns 64 key columns (and 64 value columns) of every chunk.

    What the next chunk needs is loaded as soon as its buffer is free: `early` (cotangents, states) before the levels,
    which hide it; r and ds after them; queries, keys and gates when the last results have left their places, for the
    products that come first do without them. Buffers share
    their places where they can: below 196 KB of shared memory 60 KB are left for the cache that spilled registers need.
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
        inputs, outputs, scratch = refs[:12], refs[12:19], refs[19:]
        self.q_g, self.k_g, self.raw_g, self.do_g, self.p_g, self.r_g, self.h_g, self.ds_g, *inputs = inputs
        self.t_g, self.gamma_g, self.weight_g, self.par_g = inputs
        self.dq_o, self.dk_o, self.dv_o, self.draw_o, self.dbeta_o, self.rate_o, self.bias_o = outputs
        q_s, k_s, raw_s, (self.g2_s, self.dv_s), pair_s, self.r_s, self.h_s, self.t_s, *scratch = scratch
        (self.ds_s, *work_s), self.vector_s, *barriers = scratch
        self.early_bar, self.r_bar, self.inputs_bar, self.states_bar, self.sync_bar = barriers
        self.q_in, self.k_in, self.pair_in = (
            _view(union, ref.dtype) for union, ref in ((q_s, self.q_g), (k_s, self.k_g), (pair_s, self.do_g))
        )
        self.q16, self.k16, self.pair16, self.work16 = (_view(union, f16) for union in (q_s, k_s, pair_s, work_s))
        self.work_b = _view(work_s, bf16)
        self.raw_in, self.draw_s = _view(raw_s, self.raw_g.dtype), _view(raw_s, self.draw_o.dtype)
        self.kind, self.scale, self.normalize_qk, self.packed = kind, scale, normalize_qk, packed
        self.B, self.NT, self.H, self.HV, self.num_wgs = sizes
        self.wgs = range(self.num_wgs)
        self.own, self.first = lax.axis_index("wg"), lax.axis_index("cta")
        self.jobs = [self.own] if self.num_wgs == 2 else [0, 1]  # the gradients of Aqk and L: one per warpgroup
        self.total = self.B * self.NT * self.HV
        self.num_ctas = min(MULTIPROCESSORS, self.total)
        self.slab = pl.ds(self.own * SLAB, SLAB)

    def here(self):
        """The warpgroup's own number, to be asked for anew in every stage; see `hidden_zero`."""
        return self.own + hidden_zero()

    def where(self, c):
        h, rest = lax.rem(c, self.HV), lax.div(c, self.HV)
        n, b = lax.rem(rest, self.NT), lax.div(rest, self.NT)
        return b, n, h, b * self.HV + h, pl.ds(n * C, C)

    def only(self, which, f):
        pl.when(self.own == which)(f) if self.num_wgs > 1 else f()

    def load_early(self, c, parity):
        wg = self.own
        b, n, h, bh, rows = self.where(c)
        plgpu.copy_gmem_to_smem(self.do_g.at[b, rows, h, self.slab], self.pair_in.at[0, wg], self.early_bar)
        plgpu.copy_gmem_to_smem(self.p_g.at[bh, n, :, self.slab], self.pair16.at[1, wg], self.early_bar)
        plgpu.copy_gmem_to_smem(self.h_g.at[bh, n, :, self.slab], self.h_s.at[wg], self.early_bar)
        plgpu.copy_gmem_to_smem(self.gamma_g.at[bh, n, wg], self.column_s(wg, GAMMA), self.early_bar)

        @functools.partial(self.only, 0)
        def _():
            plgpu.copy_gmem_to_smem(self.t_g.at[bh, n], self.t_s.at[0], self.early_bar)
            weights = self.vector_s.at[pl.ds(parity * (NUM_WEIGHTS * C), NUM_WEIGHTS * C)]
            plgpu.copy_gmem_to_smem(self.weight_g.at[bh, n], weights, self.early_bar)

    def load_r(self, c):
        wg = self.own
        _, n, _, bh, _ = self.where(c)
        plgpu.copy_gmem_to_smem(self.r_g.at[bh, n, :, self.slab], self.r_s.at[wg], self.r_bar)

    def load_inputs(self, c):
        wg = self.own
        b, _, h, bh, rows = self.where(c)
        head = h if self.H == self.HV else lax.div(h, self.HV // self.H)
        plgpu.copy_gmem_to_smem(self.q_g.at[b, rows, head, self.slab], self.q_in.at[wg], self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.k_g.at[b, rows, head, self.slab], self.k_in.at[wg], self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.raw_g.at[b, rows, h, self.slab], self.raw_in.at[wg], self.inputs_bar.at[wg])
        plgpu.copy_gmem_to_smem(self.par_g.at[bh, wg], self.column_s(wg, BIAS, 2), self.inputs_bar.at[wg])

    def load_ds(self, c):
        wg = self.own
        _, n, _, bh, _ = self.where(c)
        plgpu.copy_gmem_to_smem(self.ds_g.at[bh, n, :, self.slab], self.ds_s.at[wg], self.states_bar.at[wg])

    def sync(self, i):
        """Every warpgroup has done what precedes, and its writes are seen by all, the copy engine included."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.sync_bar.at[i])
        plgpu.barrier_wait(self.sync_bar.at[i])

    def token_s(self, row):
        return self.vector_s.at[pl.ds(row * C, C)]

    def own_s(self, slot, wg):
        return self.token_s(PER_TOKEN + slot * self.num_wgs + wg)

    def column_s(self, wg, row, count=1):
        start = (PER_TOKEN + PER_WG * self.num_wgs) * C + (wg * PER_COLUMN + row) * SLAB
        return self.vector_s.at[pl.ds(start, count * SLAB)]

    def token(self, row):
        return plgpu.load(self.token_s(row + hidden_zero()), layout=ROW)

    def row_weight(self, i, parity):
        return plgpu.load(self.token_s(parity * NUM_WEIGHTS + i), layout=ROW)

    def columns(self, ref):
        return by_column(plgpu.load(ref, layout=COL), (C, SLAB))

    def total_over_wgs(self, slot):
        return sum(plgpu.load(self.own_s(slot, i + hidden_zero()), layout=ROW) for i in self.wgs)

    def clean(self, x, parity):
        """Zero in place of padding, which may hold anything."""
        return jnp.where(by_row(self.row_weight(CODE, parity)) > 1.5, 0.0, x) if self.packed else x

    def gate(self, parity):
        """The raw logits of the gate, its bias in base 2 and its rate."""
        wg = self.here()
        bias2, rate = (self.columns(self.column_s(wg, i)) for i in (BIAS, SLOPE))
        return self.clean(_read(self.raw_in.at[wg]), parity), bias2, rate

    def new_values(self, c, parity):
        """Vn in place of r, do scaled in place, dv. Returns the part of dbeta that comes through r."""
        wg = self.here()
        b, _, h, _, rows = self.where(c)
        do_scale = by_row(self.row_weight(DO_SCALE, parity))
        do = _read(self.pair_in.at[0, wg]) * do_scale
        self.pair16.at[0, wg][...] = (jnp.where(do_scale > 0.0, do, 0.0) if self.packed else do).astype(f16)
        p, r = _read(self.pair16.at[1, wg]), _read(self.r_s.at[wg])
        overlap = jnp.sum(p * r, 1)
        beta = self.row_weight(BETA, parity)
        # dv, staged where the decays will be
        self.dv_s.at[wg][...] = (p * by_row(beta * self.row_weight(UNSCALE, parity))).astype(self.dv_s.dtype)
        self.r_s.at[wg][...] = (r * by_row(beta)).astype(f16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.dv_s.at[wg], self.dv_o.at[b, rows, h, self.slab])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what the last chunk gave has left the places of the inputs
        self.load_inputs(c)
        (vn,) = products([(self.t_s.at[wg - self.own], self.r_s.at[wg])])
        meet()
        self.r_s.at[wg][...] = vn.astype(f16)
        return overlap

    def prepare_inputs(self, parity):
        """The gate in base 2, and this warpgroup's part of the squared norms."""
        wg = self.here()
        g2 = (
            jnp.maximum(_log2_decay(self.kind, *self.gate(parity)), FORGET)
            if self.kind.raw
            else self.clean(_read(self.raw_in.at[wg]), parity)
        )
        if self.packed:
            code = by_row(self.row_weight(CODE, parity))
            g2 = jnp.where(code > 0.5, jnp.where(code > 1.5, 0.0, FORGET), g2)
        self.g2_s.at[wg][...] = g2.astype(f16)
        for slot, ref in ((Q_SUM, self.q_in), (K_SUM, self.k_in)):
            x = self.clean(_read(ref.at[wg]), parity)
            self.own_s(slot, wg)[...] = jnp.sum(x * x, 1)

    def normalize(self, slot, saved, x_in, x16, parity):
        wg = self.here()
        x = self.clean(_read(x_in.at[wg]), parity)
        if self.normalize_qk:
            rstd = lax.rsqrt(self.total_over_wgs(slot) + L2_EPS)

            @pl.when(self.own == 0)
            def _():
                self.token_s(saved)[...] = rstd

            x = x * by_row(rstd)
        x16.at[wg][...] = x.astype(f16)

    def pair_gradient(self, job):
        """The gradient of Aqk (job 0) or L / beta (job 1), lower triangle as it is, upper transposed: for both uses."""
        zero = hidden_zero()
        pairs = [(self.pair16.at[job, i + zero], self.r_s.at[i + zero]) for i in self.wgs]
        lower, upper = products([(x, v.T) for x, v in pairs], [(v, x.T) for x, v in pairs])
        of_l = jnp.int32(job).astype(f32)  # 0.0 or 1.0

        @pl.when(of_l == 0.0)
        def _():
            store_diagonal(lower, f32(self.scale), self.token_s(DIAGONAL))

        return fold(lower, upper, (1.0 - of_l) * self.scale - of_l)

    def state_terms(self):
        """Products with the states, still without decays: for the queries, the keys that read and those that write."""
        wg = self.here()
        values = [pl.ds(i * SLAB, SLAB) for i in self.wgs]
        states = sum(_read(self.h_s.at[wg, x]) * _read(self.ds_s.at[wg, x]) for x in values)
        column_sums(self.columns(self.column_s(wg, GAMMA)) * states, self.column_s(wg, PARTIAL, 4))
        i0 = wg - self.own
        return products(
            [(self.pair16.at[0, i + i0], self.h_s.at[wg, x]) for i, x in enumerate(values)],
            [(self.pair16.at[1, i + i0], self.h_s.at[wg, x]) for i, x in enumerate(values)],
            [(self.r_s.at[i + i0], self.ds_s.at[wg, x]) for i, x in enumerate(values)],
        )

    def decay_state_terms(self, dq, up, down):
        wg = self.here()
        (to_exit,) = products([(triangle(lower=False, inclusive=True), self.g2_s.at[wg])])
        kn = _read(self.k16.at[wg])
        down = fast_exp2(to_exit) * down
        add_column_sums(kn * down, self.column_s(wg, PARTIAL, 4))
        (from_entry,) = products([(triangle(lower=True, inclusive=True), self.g2_s.at[wg])])
        from_entry = fast_exp2(from_entry)
        dq, up = (from_entry * self.scale) * dq, -from_entry * up
        overlap = plgpu.load(self.own_s(DBETA, wg), layout=ROW)
        self.own_s(DBETA, wg)[...] = overlap - jnp.sum(kn * up, 1)
        return dq, up, down

    def level(self, parity, n, carry):
        """A level of 16 or 32 tokens, through the matrix unit."""
        dq, up, down = carry
        wg = self.here()
        (exponent,) = products([(level_triangle(n), self.g2_s.at[wg])])
        factor = fast_exp2(exponent).astype(f16)
        keys, queries = (plgpu.load(x.at[wg], layout=W) * factor for x in (self.k16, self.q16))
        self.work16.at[wg, 1][...] = by_block(n, queries, keys)
        beta = by_row(self.row_weight(BETA, parity).astype(f16))
        self.work16.at[wg, 0][...] = by_block(n, keys * beta, keys)
        plgpu.commit_smem()
        load = lambda job: plgpu.load(self.r_s.at[wg - self.own + job], layout=W)
        (of_a, _, _), (_, first, second) = (level_pairs(load(job), n) for job in range(2))
        by = products(
            [(of_a, self.work16.at[wg, 1]), (first, self.work16.at[wg, 0])], [(second, self.work16.at[wg, 0])]
        )
        meet()  # the next level overwrites what these products read
        return add_level(n, factor, by, dq, up, down)

    def finish(self, c, following, parity, dq, up, down):
        wg = self.here()
        b, n, h, bh, rows = self.where(c)
        diagonal = by_row(self.token(DIAGONAL))
        qn, kn = _read(self.q16.at[wg]), _read(self.k16.at[wg])
        dq, down = dq + diagonal * kn, down + diagonal * qn
        self.own_s(DBETA, wg)[...] = plgpu.load(self.own_s(DBETA, wg), layout=ROW) + jnp.sum(kn * up, 1)
        self.own_s(Q_SUM, wg)[...] = jnp.sum(qn * dq, 1)
        up = by_row(self.row_weight(BETA, parity).astype(f16).astype(f32)) * up
        dk = up + down
        self.own_s(K_SUM, wg)[...] = jnp.sum(kn * dk, 1)
        self.sync(3)
        pl.when(following < self.total)(lambda: self.load_r(following))
        unscale = self.row_weight(UNSCALE, parity)
        for x16, x_out, dx, rstd, dot in (
            (self.q16, self.q_in, dq, RSTD_Q, Q_SUM),
            (self.k16, self.k_in, dk, RSTD_K, K_SUM),
        ):
            if self.normalize_qk:
                dx = by_row(self.token(rstd)) * (dx - _read(x16.at[wg]) * by_row(self.total_over_wgs(dot)))
            x_out.at[wg][...] = (dx * by_row(unscale)).astype(x_out.dtype)
        wg = self.here()
        if self.packed:
            later = later_in_document(self.token_s(parity * NUM_WEIGHTS + CODE))
        else:
            later = triangle(lower=False, inclusive=False, dtype=bf16)
        (dg,) = products([(later, self.work_b.at[wg, i]) for i in range(2)])
        at_exit = sum(self.columns(self.column_s(wg, PARTIAL + i)) for i in range(4))
        if self.packed:
            unscale = jnp.where(self.row_weight(CODE, parity) > 0.5, 0.0, unscale)
            at_exit = jnp.where(by_row(self.row_weight(CODE, parity)) < -0.5, 0.0, at_exit)
        dg = (dg + at_exit) * by_row(unscale)
        if self.kind.raw:
            slope, z2 = _slope(self.kind, *self.gate(parity))
            draw = dg * slope
            # For the rate: dg g; for the bounded gate draw z.
            by_rate = jnp.sum(dg * _read(self.g2_s.at[wg]) if self.kind.bound is None else draw * z2, 1) * LN2
        else:
            draw = dg
        self.draw_s.at[wg][...] = draw.astype(self.draw_s.dtype)
        if self.kind.raw:
            self.own_s(RATE, wg)[...] = by_rate
            meet()  # past the last reads of the sums
            column_sums(draw, self.column_s(wg, PARTIAL, 4))

        @functools.partial(self.only, 0)
        def _():
            self.token_s(DBETA_TOTAL)[...] = self.total_over_wgs(DBETA) * self.row_weight(UNSCALE, parity)

        plgpu.commit_smem()
        pl.when(following < self.total)(lambda: self.load_ds(following))
        plgpu.copy_smem_to_gmem(self.q_in.at[wg], self.dq_o.at[b, rows, h, self.slab])
        plgpu.copy_smem_to_gmem(self.k_in.at[wg], self.dk_o.at[b, rows, h, self.slab])
        plgpu.copy_smem_to_gmem(self.draw_s.at[wg], self.draw_o.at[b, rows, h, self.slab])
        if self.kind.raw:
            plgpu.copy_smem_to_gmem(self.own_s(RATE, wg), self.rate_o.at[bh, n, wg])
            plgpu.copy_smem_to_gmem(self.column_s(wg, PARTIAL, 4), self.bias_o.at[bh, n, wg])
        self.only(0, lambda: plgpu.copy_smem_to_gmem(self.token_s(DBETA_TOTAL), self.dbeta_o.at[bh, n]))

    def chunk(self, i, _):
        c, parity = self.first + i * self.num_ctas, lax.rem(i, 2)
        following = c + self.num_ctas
        plgpu.barrier_wait(self.early_bar)
        plgpu.barrier_wait(self.r_bar)
        overlap = self.new_values(c, parity)
        self.sync(0)
        self.own_s(DBETA, self.own)[...] = overlap
        pair_gradients = [self.pair_gradient(job) for job in self.jobs]
        plgpu.barrier_wait(self.states_bar.at[self.own])
        dq, up, down = self.state_terms()
        plgpu.barrier_wait(self.inputs_bar.at[self.own])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dv has left the place of the decays
        meet()
        self.prepare_inputs(parity)
        self.sync(1)
        pl.when(following < self.total)(lambda: self.load_early(following, 1 - parity))
        for job, x in zip(self.jobs, pair_gradients, strict=True):
            self.r_s.at[job][...] = x
        self.normalize(Q_SUM, RSTD_Q, self.q_in, self.q16, parity)
        self.normalize(K_SUM, RSTD_K, self.k_in, self.k16, parity)
        sums = self.decay_state_terms(dq, up, down)
        self.sync(2)
        sums = lax.fori_loop(FINE, LEVELS, functools.partial(self.level, parity), sums)
        zero = hidden_zero()
        tables = fine_tables(*(self.r_s.at[zero + job] for job in range(2)), self.token_s(parity * NUM_WEIGHTS + BETA))
        # Few columns at a time: the code of all would not fit the instruction cache.
        parts = lax.fori_loop(0, SLAB // PART, functools.partial(self.fine, tables), tuple(map(cut, sums)))
        self.finish(c, following, parity, *(join(*x) for x in parts))
        return ()

    def fine(self, tables, part, sums):
        """The levels inside 16 tokens, for the columns that come first in `sums`, and go last."""
        wg = self.here()
        tiles = [*(x.at[wg] for x in (self.g2_s, self.k16, self.q16)), *(self.work_b.at[wg, i] for i in range(2))]
        new = fine_levels(*tiles, tables, part, *(x[0] for x in sums))
        return tuple((*x[1:], y) for x, y in zip(sums, new, strict=True))

    def run(self):
        """Visits the CTA's chunks."""

        self.load_early(self.first, 0)
        self.load_r(self.first)
        self.load_ds(self.first)
        lax.fori_loop(0, lax.div(self.total - self.first + self.num_ctas - 1, self.num_ctas), self.chunk, ())
        plgpu.wait_smem_to_gmem(0)


def chunk_gradients(q, k, raw, do, p, r, h, ds, t, gamma, weight, par, *, kind, scale, normalize_qk, packed):
    """See `mirror_vjp.chunk_gradients`; everything in the callers' layout, per-token weights and gate packed.

    Args:
      q, k [B,T,H,K], raw [B,T,HV,K], do [B,T,HV,V]: bfloat16 or float16 (raw in base 2, float16, without a gate).
      p, r [B*HV,NT,C,V], h, ds [B*HV,NT,V,K], t [B*HV,NT,C,C]: float16; gamma [B*HV,NT,K]: float32.
      weight [B*HV,NT,4,C]: of `_token_weights`.
      par [B*HV,2,K]: dt_bias in base 2, rate.

    Returns:
      dq, dk, draw [B,T,HV,K], dv [B,T,HV,V], dbeta [B*HV,NT,C], and sums to be completed: for the rate
      [B*HV,NT,K/64,C], for the bias [B*HV,NT,K/64,4,64].
    """
    B, T, H, K = q.shape
    HV, V = do.shape[2:]
    NT, heads, num_wgs = T // C, B * HV, K // SLAB
    assert K == V and K in (64, 128) and T % C == 0
    draw_dtype, out = raw.dtype if kind.raw else bf16, jax.ShapeDtypeStruct
    settings = dict(kind=kind, scale=scale, normalize_qk=normalize_qk, packed=packed)

    def kda_chunk_gradients(*refs):
        _Chunks(*refs, sizes=(B, NT, H, HV, num_wgs), **settings).run()

    launch = plgpu.kernel(
        kda_chunk_gradients,
        out_type=(
            out((B, T, HV, K), q.dtype), out((B, T, HV, K), q.dtype), out((B, T, HV, V), do.dtype),
            out((B, T, HV, K), draw_dtype), out((heads, NT, C), f32), out((heads, NT, num_wgs, C), f32),
            out((heads, NT, num_wgs, 4 * SLAB), f32),
        ),
        grid=(min(MULTIPROCESSORS, B * NT * HV),),
        grid_names=("cta",),
        num_threads=num_wgs,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        scratch_types=[
            _union(num_wgs, C, SLAB, dtypes=(q.dtype, f16)), _union(num_wgs, C, SLAB, dtypes=(k.dtype, f16)),
            _union(num_wgs, C, SLAB, dtypes=(raw.dtype, draw_dtype)),
            plgpu.RefUnion(tile(num_wgs, C, SLAB), tile(num_wgs, C, SLAB, dtype=do.dtype)),
            _union(2, num_wgs, C, SLAB, dtypes=(do.dtype, f16)), tile(2, C, SLAB),
            tile(num_wgs, V, SLAB), tile(1, C, C),
            plgpu.RefUnion(tile(num_wgs, V, SLAB), *(tile(num_wgs, 2, C, SLAB, dtype=d) for d in (f16, bf16))),
            plgpu.SMEM(((PER_TOKEN + PER_WG * num_wgs) * C + num_wgs * PER_COLUMN * SLAB,), f32),
            plgpu.Barrier(num_arrivals=4 * num_wgs + 2),
            plgpu.Barrier(num_arrivals=num_wgs), plgpu.Barrier(num_arrivals=4, num_barriers=num_wgs),
            plgpu.Barrier(num_arrivals=1, num_barriers=num_wgs),
            plgpu.Barrier(num_arrivals=num_wgs, num_barriers=4),
        ],
    )  # fmt: skip
    gamma = gamma.reshape(heads, NT, num_wgs, SLAB)
    par = jnp.swapaxes(par.reshape(heads, 2, num_wgs, SLAB), 1, 2).reshape(heads, num_wgs, 2 * SLAB)
    weight = weight.reshape(heads, NT, NUM_WEIGHTS * C)
    dq, dk, dv, draw, dbeta, rate, bias = launch(q, k, raw, do, p, r, h, ds, t, gamma, weight, par)
    return dq, dk, dv, draw, dbeta, rate, bias.reshape(heads, NT, num_wgs, 4, SLAB)


def backward(
    q, k, g, beta, code, gate: Gate, prepared, h, r, applied, do, dfinal, size, *, scale, normalize_qk, leave=None
) -> Gradients:
    """Gradients of `chunk_kda` from what its forward kept.

    Args:
      q, k, g, beta, code, gate: as in `prepare_mosaic_gpu.prepare`, which returned `prepared`.
      h, r: what the forward recurrence kept: the states entering the chunks, and V - Kg S.
      applied, leave: see `segments_mosaic_gpu.recur_back`; `leave` takes and returns what is times `size`.
      do: cotangent of o, bfloat16 or float16, anything at padding; dfinal: of the final state, float32.
      size: power of two per row and head, [B, HV] float32, by which cotangents are multiplied inside.

    The gradient of a float32 g is rounded to bfloat16.
    """
    B, T, H, K = q.shape
    HV = g.shape[2]
    NT = T // C
    weight, of_state = _token_weights(beta, code, size), size[:, :, None, None]
    last = (dfinal * of_state).reshape(B * HV, -1, K)
    ds, p, dinitial = recur_back(prepared, beta, weight[:, :, DO_SCALE], do, last, applied, leave=leave)
    dinitial = dinitial.reshape(dfinal.shape) / of_state
    fused = gate is not None and g.dtype != f32
    raw = g if fused else _base2(g if gate is None else log_decay_of_rows(gate, g))
    kind = _GateKind(fused, gate.bound if isinstance(gate, LowerBoundGate) else None)
    dq, dk, dv, dg, dbeta, rate, bias = chunk_gradients(
        *(q, k, raw, do, p, r, h, ds, prepared.t, prepared.gamma, weight, _gate_parameters(gate, B * HV, K)),
        **dict(kind=kind, scale=scale, normalize_qk=normalize_qk, packed=code is not None),
    )
    da_log = ddt_bias = None
    if fused:
        da_log = rate.reshape(B, HV, -1).sum(2)
        ddt_bias = bias.reshape(B, HV, NT, K // SLAB, 4, SLAB).sum((2, 4)).reshape(B, HV, K)
    elif gate is not None:
        clean = g if code is None else jnp.where((code == PADDING).reshape(B, T, 1, 1), 0, g)
        _, pull = jax.vjp(log_decay_of_rows, gate, clean)
        dgate, dg = pull(dg.astype(f32))
        da_log, ddt_bias = dgate.a_log, dgate.dt_bias
    of_head = lambda x: x.reshape(B, T, H, HV // H, K).astype(f32).sum(3).astype(x.dtype) if HV != H else x
    if getattr(gate, "a_log", None) is None:
        da_log = None
    return Gradients(of_head(dq), of_head(dk), dv, dg.astype(g.dtype), dbeta, da_log, ddt_bias, dinitial)


def _token_weights(beta, code, size):
    """[B*HV, NT, 4, C] float32: beta, scale of do (0 at padding), its inverse for the outputs (likewise), a code.

    The code is 1 where a document starts, 2 at padding, else minus the number of documents that start behind the token
    in its chunk, so that tokens of one document know each other.
    """
    heads, _, _ = beta.shape
    size = jnp.broadcast_to(size.reshape(heads, 1, 1), beta.shape)
    if code is None:
        return jnp.stack([beta, size, 1 / size, jnp.zeros_like(beta)], 2)
    starts = (code == RESET).astype(jnp.int32)
    code = jnp.where(code == 0, jnp.cumsum(starts, 2) - jnp.sum(starts, 2, keepdims=True), code)
    code = jnp.repeat(code, heads // code.shape[0], axis=0)
    keep = lambda x: jnp.where(code != PADDING, x, 0.0)
    return jnp.stack([beta, keep(size), keep(1 / size), code.astype(f32)], 2)


def _base2(g):
    return jnp.maximum(g.astype(f32) * LOG2E, FORGET).astype(f16)  # as the forward kernel rounds it


def _gate_parameters(gate: Gate, heads: int, K: int):
    """dt_bias in base 2 and exp(a_log) per channel, [B * HV, 2, K]."""
    if gate is None:
        return jnp.zeros((heads, 2, K), f32)
    rate = jnp.ones((heads,), f32) if gate.a_log is None else jnp.exp(gate.a_log.astype(f32)).reshape(heads)
    bias = (gate.dt_bias.astype(f32) * LOG2E).reshape(heads, K)
    return jnp.stack([bias, jnp.broadcast_to(rate[:, None], (heads, K))], 1)
