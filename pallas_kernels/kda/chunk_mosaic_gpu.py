"""KDA on Hopper, second kernel: the recurrence from chunk to chunk, one head at a time, with the state in registers."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.kda.prepare_mosaic_gpu import (
    PADDING,
    ROWS,
    C,
    Prepared,
    add_product,
    by_column,
    f16,
    f32,
    products,
    tile,
)

STRIP = 64  # value rows of the state per warpgroup, the height of a wgmma
STAGES = 2  # chunks in flight from device memory
MEMORY_REGISTERS = 40  # of the warpgroup that only starts copies


def recur(
    prepared: Prepared,
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "BH N C"],
    code: Int[Array, "B N C"] | None,
    initial_state: Float[Array, "BH V K"] | None,
    *,
    keep: bool,
    split: int,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "BH V K"], tuple[Array, Array] | None]:
    """Runs the chunks of every head in order, the state S transposed to [V, K]:

      R = V - Kg S;  Vn = T (beta R);  O = Qg S + Aqk Vn;  S <- diag(gamma) S + Kr^T Vn

    Args:
      v: bfloat16 or float16, V 64 or 128; any values at padding.
      beta, code: as for `prepare`.
      initial_state: float32; None: zero.
      keep: also return what the backward pass reads.
      split: blocks per head, each with V / split value rows; more than 1 when heads are too few to fill the device.

    Returns:
      (o in the dtype of v, final state float32, None or (state entering each chunk float16 [BH, N, V, K],
      R float16 [BH, N, C, V])). Operands are float16: |v|, |R|, |S| must stay below 65504; beyond, o is not
      finite.
    """
    B, T, HV, V = v.shape
    BH, N, _, K = prepared.kg.shape
    packed, carried = code is not None, initial_state is not None
    strips = V // STRIP // split
    struct, squeezed = jax.ShapeDtypeStruct, pl.Squeezed()
    outputs = [struct((B, N, C, HV, V), v.dtype), struct((BH, V, K), f32)]
    staging = [tile(strips, C, STRIP, dtype=v.dtype)]
    if keep:
        outputs += [struct((BH, N, V, K), f16), struct((BH, N, C, V), f16)]
        staging += [tile(strips, STRIP, K), tile(strips, C, STRIP)]
    if packed:  # a negative step marks padding: one stream less, and the error there is 0 whatever the step
        beta = jnp.where(jnp.repeat(code, HV, axis=0) == PADDING, -1.0, beta)
    inputs = [*prepared, beta, v.reshape(B, N, C, HV, V)]

    def kernel(*refs):
        streamed, refs = refs[: len(inputs)], refs[len(inputs) :]
        first, refs = (refs[0], refs[1:]) if carried else (None, refs)
        outs, staged = refs[: len(outputs)], refs[len(outputs) :]
        bh, part, strip = lax.axis_index("head"), lax.axis_index("part"), lax.axis_index("strip")
        b, hv = lax.div(bh, HV), lax.rem(bh, HV)
        mine, rows = pl.ds(strip * STRIP, STRIP), pl.ds((part * strips + strip) * STRIP, STRIP)

        def compute(pipeline):
            if carried:
                state = plgpu.load(first.at[bh, rows], layout=ROWS, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((STRIP, K), f32), ROWS)
            outs[1].at[bh, rows][...] = pipeline(state)

        def step(index, kg, kr, qg, t, aqk, gamma, beta, v, state):
            (n,) = index
            values = plgpu.load(v.at[:, mine].T, layout=ROWS).astype(f32)
            step_size = by_column(plgpu.load(beta, layout=ROWS.reduce(0)), (STRIP, C))
            if packed:
                values = jnp.where(step_size < 0.0, 0.0, values)
            state16 = state.astype(f16)
            (read,) = products([(state16, kg.T)], shape=(STRIP, C))
            error = values - read
            (new,) = products([((error * step_size).astype(f16), t.T)], shape=(STRIP, C))
            new = new.astype(f16)
            (o,) = products([(state16, qg.T), (new, aqk.T)], shape=(STRIP, C))
            decay = by_column(plgpu.load(gamma, layout=ROWS.reduce(0)), (STRIP, K))
            state = add_product(state * decay, new, kr)
            staged[0].at[strip].T[...] = o.astype(staged[0].dtype)
            targets = [outs[0].at[b, n, :, hv, rows]]
            if keep:
                staged[1].at[strip][...] = state16
                staged[2].at[strip].T[...] = error.astype(f16)
                targets += [outs[2].at[bh, n, rows], outs[3].at[bh, n, :, rows]]
            plgpu.commit_smem()
            for source, target in zip(staged, targets, strict=True):
                plgpu.copy_smem_to_gmem(source.at[strip], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return state

        chunk = lambda n: (bh, n, 0, 0)
        row = lambda n: (bh, n, 0)
        blocks = [*[(C, K, chunk)] * 3, *[(C, C, chunk)] * 2, (K, row), (C, row)]
        specs = [_block(*shape, index=index) for *shape, index in blocks]
        specs.append(
            plgpu.BlockSpec(
                (squeezed, squeezed, C, squeezed, V // split), lambda n: (b, n, 0, hv, part), transforms=_SWIZZLED
            )
        )
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(N,),
            memory_registers=MEMORY_REGISTERS,
            max_concurrent_steps=min(STAGES, N),
            wg_axis="strip",
            num_compute_wgs=strips,
            compute_context=compute,
            in_specs=specs,
        )(*streamed)

    launch = plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(BH, split),
        grid_names=("head", "part"),
        num_threads=strips + 1,
        thread_name="strip",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),  # nothing is reduced, and memory is tight
        scratch_types=staging,
    )
    o, state, *kept = launch(*inputs, *([initial_state] if carried else []))
    return o.reshape(B, T, HV, V), state, tuple(kept) if keep else None


_SWIZZLED = tile(8, 64).transforms


def _block(*shape: int, index):
    """One chunk of one head, tiled for the matrix unit if it is a matrix."""
    squeezed = pl.Squeezed()
    return plgpu.BlockSpec((squeezed, squeezed, *shape), index, transforms=_SWIZZLED if len(shape) == 2 else ())
