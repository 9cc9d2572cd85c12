"""KDA on Hopper, second kernel: the recurrence from chunk to chunk, one head at a time, with the state in registers."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import MULTIPROCESSORS
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


def blocks_per_head(V: int, heads: int) -> int:
    """How many blocks share the values of a head: more than one when heads are too few to fill the device."""
    return 2 if V == 2 * STRIP and 2 * heads <= MULTIPROCESSORS else 1


def run_segments(
    prepared: Prepared,
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "BH N C"],
    code: Int[Array, "B N C"] | None,
    entering: Float[Array, "BH S V K"] | None,
    *,
    keep: bool,
    split: int,
    segments: int = 1,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "BH S V K"], tuple[Array, Array] | None]:
    """Runs the chunks of every segment in order, the state S transposed to [V, K]:

      R = V - Kg S;  Vn = T (beta R);  O = Qg S + Aqk Vn;  S <- diag(gamma) S + Kr^T Vn

    Args:
      v: bfloat16 or float16, V 64 or 128; any values at padding.
      beta, code: as for `prepare`.
      entering: the state entering each segment, float32; None: zero.
      keep: also return what the backward pass reads.
      split: blocks per head, each with V / split value rows; see `blocks_per_head`.
      segments: equal parts of the chunks of every head, which run side by side; must divide N.

    Returns:
      (o in the dtype of v, state leaving each segment float32, None or (state entering each chunk float16
      [BH, N, V, K], R float16 [BH, N, C, V])). Operands are float16: |v|, |R|, |S| must stay below 65504; beyond, o
      is not finite.
    """
    B, T, HV, V = v.shape
    BH, N, _, K = prepared.kg.shape
    packed, carried = code is not None, entering is not None
    strips, length = V // STRIP // split, N // segments
    struct = jax.ShapeDtypeStruct
    outputs = [struct((B, N, C, HV, V), v.dtype), struct((BH, segments, V, K), f32)]
    staging = [tile(strips, C, STRIP, dtype=v.dtype)]
    if keep:
        outputs += [struct((BH, N, V, K), f16), struct((BH, N, C, V), f16)]
        staging += [tile(strips, STRIP, K), tile(strips, C, STRIP)]
    inputs = [*prepared, mark_padding(beta, code, HV), v.reshape(B, N, C, HV, V)]

    def kda_recurrence(*refs):
        streamed, refs = refs[: len(inputs)], refs[len(inputs) :]
        first, refs = (refs[0], refs[1:]) if carried else (None, refs)
        outs, staged = refs[: len(outputs)], refs[len(outputs) :]
        bh, segment, part, strip = (lax.axis_index(name) for name in ("head", "segment", "part", "strip"))
        b, hv, start = lax.div(bh, HV), lax.rem(bh, HV), segment * length
        mine, rows = pl.ds(strip * STRIP, STRIP), pl.ds((part * strips + strip) * STRIP, STRIP)

        def write(n, o, error=None):
            """Sends what chunk n gave on its way."""
            staged[0].at[strip].T[...] = o
            if keep:
                staged[2].at[strip].T[...] = error
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged[0].at[strip], outs[0].at[b, n, :, hv, rows])
            if keep:
                plgpu.copy_smem_to_gmem(staged[2].at[strip], outs[3].at[bh, n, :, rows])

        def compute(pipeline):
            empty = lambda width, dtype: plgpu.layout_cast(jnp.zeros((STRIP, width), dtype), ROWS)
            state = empty(K, f32)
            if carried:
                state = plgpu.load(first.at[bh, segment, rows], layout=ROWS, optimized=False)
            state, *last = pipeline((state, empty(C, v.dtype), *([empty(C, f16)] if keep else [])))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            write(start + length - 1, *last)
            outs[1].at[bh, segment, rows][...] = state
            plgpu.wait_smem_to_gmem(0)

        def step(index, kg, kr, qg, t, aqk, gamma, beta, v, carry):
            n, (state, *last) = start + index[0], carry
            state16 = state.astype(f16)

            def behind():  # the products: nothing waits for these
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if keep:
                    staged[1].at[strip][...] = state16
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged[1].at[strip], outs[2].at[bh, n, rows])
                pl.when(n > start)(lambda: write(n - 1, *last))

            values = load_values(v.at[:, mine], beta, least=0.0 if packed else None)  # negative: padding
            error, new = new_values(state16, *values, kg, t, behind)
            decayed = state * by_column(plgpu.load(gamma, layout=ROWS.reduce(0)), (STRIP, K))

            def results(o):
                plgpu.wgmma(o, state16, qg.T)
                plgpu.wgmma(o, new, aqk.T)
                return add_product(decayed, new, kr), o[...].astype(staged[0].dtype)

            state, o = pl.run_scoped(results, plgpu.ACC((STRIP, C), f32))
            return (state, o, *([error.astype(f16)] if keep else []))

        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(length,),
            memory_registers=MEMORY_REGISTERS,
            max_concurrent_steps=min(STAGES, length),
            wg_axis="strip",
            num_compute_wgs=strips,
            compute_context=compute,
            in_specs=[
                *[block(C, K, at=lambda n: (bh, start + n, 0, 0))] * 3,
                *[block(C, C, at=lambda n: (bh, start + n, 0, 0))] * 2,
                *[block(size, at=lambda n: (bh, start + n, 0)) for size in (K, C)],
                values_block(V // split, at=lambda n: (b, start + n, 0, hv, part)),
            ],
        )(*streamed)

    launch = plgpu.kernel(
        kda_recurrence,
        out_type=outputs,
        grid=(BH, segments, split),
        grid_names=("head", "segment", "part"),
        num_threads=strips + 1,
        thread_name="strip",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),  # nothing is reduced, and memory is tight
        scratch_types=staging,
    )
    o, states, *kept = launch(*inputs, *([entering] if carried else []))
    return o.reshape(B, T, HV, V), states, tuple(kept) if keep else None


def mark_padding(beta: Float[Array, "BH N C"], code: Int[Array, "B N C"] | None, heads: int):
    """The step sizes with -1 at padding: one stream less, and the error there is 0 whatever the step."""
    return beta if code is None else jnp.where(jnp.repeat(code, heads, axis=0) == PADDING, -1.0, beta)


def load_values(v, beta, *, least=None):
    """(values, step sizes), float32 [STRIP, C], of a chunk in shared memory; a step below `least` has values 0."""
    values = plgpu.load(v.T, layout=ROWS).astype(f32)
    step_size = by_column(plgpu.load(beta, layout=ROWS.reduce(0)), (STRIP, C))
    return values if least is None else jnp.where(step_size < least, 0.0, values), step_size


def new_values(state16, values, step_size, kg, t, behind=lambda: None):
    """What one chunk adds to the state: (R^T float32, Vn^T float16), [STRIP, C]; `behind` runs beside a product."""

    def read(accumulator):
        plgpu.wgmma(accumulator, state16, kg.T)
        behind()
        return accumulator[...]

    error = values - pl.run_scoped(read, plgpu.ACC((STRIP, C), f32))
    (new,) = products([((error * step_size).astype(f16), t.T)], shape=(STRIP, C))
    return error, new.astype(f16)


_SWIZZLED = tile(8, 64).transforms


def block(*shape: int, at):
    """One chunk of one head, tiled for the matrix unit if it is a matrix; `at` gives its place in the whole array."""
    squeezed = pl.Squeezed()
    return plgpu.BlockSpec((squeezed, squeezed, *shape), at, transforms=_SWIZZLED if len(shape) == 2 else ())


def values_block(width: int, at):
    """One chunk of the values of one head, `width` of its channels."""
    squeezed = pl.Squeezed()
    return plgpu.BlockSpec((squeezed, squeezed, C, squeezed, width), at, transforms=_SWIZZLED)
