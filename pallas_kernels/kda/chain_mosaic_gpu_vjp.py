"""Backward of KDA on Hopper, first kernel: the chain from the last chunk to the first, gradients of the states."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.kda.chunk_mosaic_gpu import MEMORY_REGISTERS, STAGES, STRIP, block, blocks_per_head
from pallas_kernels.kda.prepare_mosaic_gpu import ROWS, C, Prepared, by_column, f16, f32, products, tile

_COLUMNS = ROWS.reduce(0)  # layout of one value per column


def reverse_chain(
    prepared: Prepared,
    beta: Float[Array, "BH N C"],
    do_scale: Float[Array, "BH N C"],
    do: Float[Array, "B T HV V"],
    leaving: Float[Array, "BH F V K"],
    *,
    segments: int | None = None,
    keep: bool = True,
) -> tuple[Float[Array, "BH F V K"], tuple[Float[Array, "BH N V K"], Float[Array, "BH N C V"]] | None]:
    """Runs the chunks of every segment from the last to the first; letters as in `chunk_mosaic_gpu.run_segments`:

      dVn = Aqk^T dO + Kr dS;  P = T^T dVn;  dS <- diag(gamma) dS + Qg^T dO - Kg^T (beta P)

    Args:
      do: cotangent of o, bfloat16 or float16, anything at padding; do_scale: float32 factor, 0 at padding.
      leaving: gradient of the state that leaves each segment, float32, times the same factors.
      segments: equal parts of the chunks of every head, of which the last F run; None: F.
      keep: also return what the gradients inside the chunks need; all segments must run.

    Returns:
      (dS entering each segment float32, None or (dS leaving each chunk float16, P float16)).
    """
    heads, NT, _, K = prepared.kg.shape
    HV, V = do.shape[2:]
    split, found = blocks_per_head(V, heads), leaving.shape[1]
    segments = segments or found
    num_wgs, length, state_rows = V // STRIP // split, NT // segments, (STRIP, K)

    def kda_reverse_chain(kg, kr, qg, t, aqk, gamma, beta, do_scale, do, leaving, entering, *kept):
        ds_out, p_out, ds_stage, p_stage = kept if keep else (None,) * 4
        bh, segment, part, wg = (lax.axis_index(name) for name in ("head", "segment", "part", "wg"))
        b, h, last = lax.div(bh, HV), lax.rem(bh, HV), (segment + 1 + segments - found) * length - 1
        mine, values = pl.ds(wg * STRIP, STRIP), pl.ds((part * num_wgs + wg) * STRIP, STRIP)

        def compute(pipeline):
            ds = plgpu.load(leaving.at[bh, segment, values], layout=ROWS, optimized=False)
            entering.at[bh, segment, values][...] = pipeline(ds)
            plgpu.wait_smem_to_gmem(0)

        def chunk(index, kg_s, kr_s, qg_s, t_s, aqk_s, gamma_s, beta_s, scale_s, do_s, ds):
            n = last - index[0]
            ds16 = ds.astype(f16)
            scale = by_column(plgpu.load(scale_s, layout=_COLUMNS))
            do_t = plgpu.load(do_s.at[:, mine].T, layout=ROWS).astype(f32)
            do_t = jnp.where(scale > 0.0, do_t * scale, 0.0).astype(f16)
            (dvn,) = products([(do_t, aqk_s), (ds16, kr_s.T)])
            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ds_stage.at[wg][...] = ds16
            (p,) = products([(dvn.astype(f16), t_s)])
            dv = (p * by_column(-plgpu.load(beta_s, layout=_COLUMNS))).astype(f16)
            if keep:
                p_stage.at[wg].T[...] = p.astype(f16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(ds_stage.at[wg], ds_out.at[bh, n, values])
                plgpu.copy_smem_to_gmem(p_stage.at[wg], p_out.at[bh, n, :, values])

            def accumulate(acc):
                plgpu.wgmma(acc, do_t, qg_s)
                plgpu.wgmma(acc, dv, kg_s)

            kept = ds * by_column(plgpu.load(gamma_s, layout=_COLUMNS), state_rows)
            return pl.run_state(accumulate)(plgpu.ACC.init(kept))

        at, vector_at = lambda i: (bh, last - i, 0, 0), lambda i: (bh, last - i, 0)
        skip = pl.Squeezed()
        cotangents = plgpu.BlockSpec(
            (skip, C, skip, V // split), lambda i: (b, last - i, h, part), transforms=tile(8, 64).transforms
        )
        plgpu.emit_pipeline_warp_specialized(
            chunk,
            grid=(length,),
            memory_registers=MEMORY_REGISTERS,
            max_concurrent_steps=min(STAGES, length),
            wg_axis="wg",
            num_compute_wgs=num_wgs,
            compute_context=compute,
            in_specs=[
                *[block(C, K, at=at)] * 3,
                *[block(C, C, at=at)] * 2,
                *[block(size, at=vector_at) for size in (K, C, C)],
                cotangents,
            ],
            out_specs=[],
        )(kg, kr, qg, t, aqk, gamma, beta, do_scale, do)

    outputs, staging = [jax.ShapeDtypeStruct(leaving.shape, f32)], []
    if keep:
        outputs += [jax.ShapeDtypeStruct((heads, NT, *shape), f16) for shape in ((V, K), (C, V))]
        staging = [tile(num_wgs, STRIP, K), tile(num_wgs, C, STRIP)]
    launch = plgpu.kernel(
        kda_reverse_chain,
        out_type=outputs,
        grid=(heads, found, split),
        grid_names=("head", "segment", "part"),
        num_threads=num_wgs + 1,
        thread_name="wg",
        scratch_types=staging,
    )
    entering, *kept = launch(*prepared, beta, do_scale, do, leaving)
    return entering, tuple(kept) if keep else None
