"""KDA on Hopper for few heads: segments of time run side by side, joined by the maps that they apply to states.

Over a segment the state changes by an affine map, S -> M S + H. One pass over the state alone finds both, since the
recurrence is linear: H is where it takes a zero state, M where it takes the identity if all values are zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.kda.chunk_mosaic_gpu import (
    MEMORY_REGISTERS,
    STAGES,
    STRIP,
    block,
    load_values,
    mark_padding,
    new_values,
    run_segments,
    values_block,
)
from pallas_kernels.kda.prepare_mosaic_gpu import (
    ROWS,
    C,
    Prepared,
    add_product,
    by_column,
    by_row,
    f16,
    f32,
    i32,
)

WORTH = 100  # chunks that segments must take off the sequential chain to pay for the pass that finds their maps


def recur(
    prepared: Prepared,
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "BH N C"],
    code: Int[Array, "B N C"] | None,
    initial_state: Float[Array, "BH V K"] | None,
    *,
    keep: bool,
    split: int,
    segments: int | None = None,
    run: Callable = run_segments,
    find_maps: Callable | None = None,
    enter: Callable | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "BH V K"], tuple[Array, Array] | None, Any]:
    """Runs the recurrence, over as many segments at once as pays.

    Args:
      prepared, v, beta, code, keep, split: see `run_segments`.
      initial_state: float32; None: zero.
      segments: None: as many as pay.
      run, find_maps: the kernels, or their mirrors on a CPU.
      enter: (H, M) of the whole sequence -> (the state that enters it, anything), in place of `initial_state`, for a
        sequence that begins on other devices; None: it begins here.

    Returns:
      As `run_segments`, with the last state only; and what else `enter` returned, or None.
    """
    BH, N = beta.shape[:2]
    count = count_segments(N, BH * split, mapped=enter is not None) if segments is None else segments
    entering, found = None if initial_state is None else initial_state[:, None], None
    if count > 1 or enter is not None:
        added, applied = (find_maps or segment_maps)(prepared, v, beta, code, segments=count, last=enter is not None)
        if enter is not None:
            initial_state, found = enter(*join_maps(added, applied))
            added, applied = added[:, :-1], applied[:, :-1]
        entering = entering_states(initial_state, added, applied)
    o, states, kept = run(prepared, v, beta, code, entering, keep=keep, split=split, segments=count)
    return o, states[:, -1], kept, found


def count_segments(chunks: int, blocks: int, *, mapped: bool = False) -> int:
    """How many segments to cut `chunks` into when one would keep `blocks` multiprocessors busy.

    All chunks of a segment run twice, so fewer than three segments never pay; with `mapped` they do so in any case.
    """
    fitting = [n for n in range(1, MULTIPROCESSORS // blocks + 1) if chunks % n == 0]
    count = max(fitting, default=1)
    return count if mapped or (count > 2 and chunks - 2 * (chunks // count) >= WORTH) else 1


def join_maps(
    added: Float[Array, "BH S V K"], applied: Float[Array, "BH S K K"]
) -> tuple[Float[Array, "BH V K"], Float[Array, "BH K K"]]:
    """(H, M) of S segments one after the other."""
    V, K = added.shape[2:]
    nothing_and_identity = jnp.broadcast_to(jnp.eye(V + K, K, -V), (len(added), V + K, K))
    joined = entering_states(nothing_and_identity, jnp.pad(added, ((0, 0), (0, 0), (0, K), (0, 0))), applied)[:, -1]
    return joined[:, :V], joined[:, V:]


def entering_states(
    initial_state: Float[Array, "BH V K"] | None, added: Float[Array, "BH S V K"], applied: Float[Array, "BH S K K"]
) -> Float[Array, "BH S+1 V K"]:
    """The state entering each segment, float32, from the maps of all but the last; see `segment_maps`."""
    states = [jnp.zeros_like(added[:, 0]) if initial_state is None else initial_state]
    for n in range(added.shape[1]):
        moved = jnp.einsum("zvk,zkc->zvc", states[-1], applied[:, n], precision=lax.Precision.HIGHEST)
        states.append(moved + added[:, n])
    return jnp.stack(states, 1)


def segment_maps(
    prepared: Prepared,
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "BH N C"],
    code: Int[Array, "B N C"] | None,
    *,
    segments: int,
    last: bool = False,
) -> tuple[Float[Array, "BH S V K"], Float[Array, "BH S K K"]]:
    """(H, M) of every segment, of the `last` one on request, V first: a state S [V, K] leaves as S M + H. Float32."""
    B, _, HV, V = v.shape
    BH, N, _, K = prepared.kg.shape
    length, parts, found = N // segments, V // STRIP, segments if last else segments - 1
    inputs = [prepared.kg, prepared.kr, prepared.t, prepared.gamma]
    inputs += [mark_padding(beta, code, HV), v.reshape(B, N, C, HV, V)]

    def kda_segment_maps(*refs):
        *streamed, maps = refs
        bh, segment, part = (lax.axis_index(name) for name in ("head", "segment", "part"))
        b, hv, start = lax.div(bh, HV), lax.rem(bh, HV), segment * length

        def compute(pipeline):
            row = plgpu.broadcasted_iota(i32, (STRIP,), 0, layout=ROWS.reduce(1)) + (part - parts) * STRIP
            column = plgpu.broadcasted_iota(i32, (K,), 0, layout=ROWS.reduce(0))
            identity = by_row(row, (STRIP, K)) == by_column(column, (STRIP, K))  # no row of it in the parts of H
            maps.at[bh, segment, pl.ds(part * STRIP, STRIP)][...] = pipeline(jnp.where(identity, 1.0, 0.0))

        def step(_, kg, kr, t, gamma, beta, v, state):
            values = load_values(v, beta, least=jnp.where(part < parts, 0.0, jnp.inf))  # M takes none
            _, new = new_values(state.astype(f16), *values, kg, t)
            decay = by_column(plgpu.load(gamma, layout=ROWS.reduce(0)), (STRIP, K))
            return add_product(state * decay, new, kr)

        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(length,),
            memory_registers=MEMORY_REGISTERS,
            max_concurrent_steps=min(STAGES, length),
            wg_axis="strip",
            num_compute_wgs=1,
            compute_context=compute,
            in_specs=[
                *[block(C, K, at=lambda n: (bh, start + n, 0, 0))] * 2,
                block(C, C, at=lambda n: (bh, start + n, 0, 0)),
                *[block(size, at=lambda n: (bh, start + n, 0)) for size in (K, C)],
                values_block(STRIP, at=lambda n: (b, start + n, 0, hv, jnp.minimum(part, parts - 1))),
            ],
        )(*streamed)

    launch = plgpu.kernel(
        kda_segment_maps,
        out_type=jax.ShapeDtypeStruct((BH, found, V + K, K), f32),
        grid=(BH, found, parts + K // STRIP),
        grid_names=("head", "segment", "part"),
        num_threads=2,
        thread_name="strip",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
    maps = launch(*inputs)
    return maps[:, :, :V], maps[:, :, V:]
