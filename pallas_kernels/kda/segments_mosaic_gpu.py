"""KDA on Hopper for few heads: segments of time run side by side, joined by the maps that they apply to states.

Over a segment the state changes by an affine map, S -> S M + H. One pass over the state alone finds both, since the
recurrence is linear: H is where it takes a zero state, M where it takes the identity if all values are zero. Gradients
of states go back through the same M, transposed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.kda.chain_mosaic_gpu_vjp import reverse_chain
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

WORTH = 64  # chunks that segments must take off the sequential chain to pay for the pass that finds their maps


def recur(
    prepared: Prepared,
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "BH N C"],
    code: Int[Array, "B N C"] | None,
    initial_state: Float[Array, "BH V K"] | None,
    *,
    keep: bool,
    split: int,
    segments: int,
    run: Callable = run_segments,
    find_maps: Callable | None = None,
    enter: Callable | None = None,
) -> tuple[
    Float[Array, "B T HV V"], Float[Array, "BH V K"], tuple[Array, Array] | None, Float[Array, "BH S K K"] | None
]:
    """Runs the recurrence, all segments at once.

    Args:
      prepared, v, beta, code, keep, split, segments: see `run_segments`.
      initial_state: float32; None: zero.
      run, find_maps: the kernels, or their mirrors on a CPU.
      enter: (H, M) of the whole sequence -> the state that enters it, in place of `initial_state`, for a sequence that
        begins on other devices; None: it begins here.

    Returns:
      As `run_segments`, with the last state only; and, if maps were needed, M of the segments, with `keep` of all.
    """
    entering, applied = None if initial_state is None else initial_state[:, None], None
    if segments > 1 or enter is not None:
        last = keep or enter is not None
        added, applied = (find_maps or segment_maps)(prepared, v, beta, code, segments=segments, last=last)
        initial_state = initial_state if enter is None else enter(*join_maps(added, applied))
        entering = entering_states(initial_state, *(x[:, : segments - 1] for x in (added, applied)))
    o, states, kept = run(prepared, v, beta, code, entering, keep=keep, split=split, segments=segments)
    return o, states[:, -1], kept, applied


def recur_back(
    prepared: Prepared,
    beta: Float[Array, "BH N C"],
    do_scale: Float[Array, "BH N C"],
    do: Float[Array, "B T HV V"],
    dfinal: Float[Array, "BH V K"],
    applied: Float[Array, "BH S K K"] | None,
    *,
    run: Callable = reverse_chain,
    leave: Callable | None = None,
) -> tuple[Float[Array, "BH N V K"], Float[Array, "BH N C V"], Float[Array, "BH V K"]]:
    """Runs the reverse chain, all segments at once.

    Args:
      prepared, beta, do_scale, do: see `reverse_chain`.
      dfinal: gradient of the final state, float32, times the factors of `do`.
      applied: M of every segment, as `recur` returns it; None: there is one segment.
      run: the kernel, or its mirror on a CPU.
      leave: (H, M) of the whole sequence, for gradients, -> the gradient of the state that leaves it, in place of
        `dfinal`, for a sequence that ends on other devices; None: it ends here. With it `applied` is needed.

    Returns:
      (dS leaving each chunk float16, P float16, gradient of the initial state float32), in the scale of the cotangents.
    """
    leaving = dfinal[:, None]
    if applied is not None:
        segments, back = applied.shape[1], lambda x: x[:, ::-1]
        alone = jnp.zeros((len(dfinal), segments - (leave is None), *dfinal.shape[1:]), f32)
        added, _ = run(prepared, beta, do_scale, do, alone, segments=segments, keep=False)
        added, applied = back(added), back(applied.mT)
        dfinal = dfinal if leave is None else leave(*join_maps(added, applied))
        leaving = back(entering_states(dfinal, *(x[:, : segments - 1] for x in (added, applied))))
    entering, kept = run(prepared, beta, do_scale, do, leaving)
    return *kept, entering[:, 0]


def count_segments(chunks: int, blocks: int, *, mapped: bool = False) -> int:
    """How many segments to cut `chunks` into when one would keep `blocks` multiprocessors busy.

    All chunks of a segment run twice, so fewer than three segments never pay; with `mapped` they do so in any case.
    """
    fitting = [n for n in range(1, MULTIPROCESSORS // blocks + 1) if chunks % n == 0]
    count = max(fitting, default=1)
    return count if mapped or (count > 2 and chunks - 2 * (chunks // count) >= WORTH) else 1


def fill_chunks(chunks: int, blocks: int) -> int:
    """How many chunks to fill up to with padding, so that they are cut well; see `count_segments`.

    Padding copies every array, so the longest chain must become half as long.
    """
    length = pl.cdiv(chunks, max(1, MULTIPROCESSORS // blocks))
    filled = pl.cdiv(chunks, length) * length

    def chain(chunks):
        count = count_segments(chunks, blocks)
        return chunks if count == 1 else 2 * chunks // count

    return filled if 2 * chain(filled) <= chain(chunks) else chunks


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
    first = jnp.zeros((len(added), 1, *added.shape[2:]), f32) if initial_state is None else initial_state[:, None]
    states, maps, span = jnp.concatenate([first, added], 1), jnp.pad(applied, ((0, 0), (1, 0), (0, 0), (0, 0))), 1
    multiply = functools.partial(jnp.einsum, "znvk,znkc->znvc", precision=lax.Precision.HIGHEST)
    while span <= added.shape[1]:  # entries are maps of so many segments together; all of them double at once
        moved, joined = (multiply(x[:, :-span], maps[:, span:]) for x in (states, maps))
        states, maps, span = states.at[:, span:].add(moved), maps.at[:, span:].set(joined), 2 * span
    return states


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
