"""Attention on Hopper, forward: two warpgroups compute, a third copies keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla.tiles import (
    BY_ROW,
    HEIGHT,
    LOG2E,
    NOTHING,
    ROWS,
    SHARED_BYTES,
    TEAMS,
    KeyBuffers,
    Shape,
    add_products,
    copy_keys,
    f32,
    i32,
    load_gmem,
    read_span,
    split_roles,
    spread_rows,
    tile,
    visible,
    zeros,
)

STAGES = 2  # blocks of keys and values in shared memory
NO_KEY = -1e30  # offset of a row that sees nothing: its probabilities are 0 whatever the logits


class Result(NamedTuple):
    """What the forward kernel returns; the vectors are float32 and padded to whole thread blocks.

    Args:
      o: dtype of the inputs.
      offset: minus the log of the sum of exponentials, over `scale`: a probability is exp(scale (q . k + offset)).
        -1e30 for a row that sees nothing.
      peak: largest logit in log2 units; -1e30 for a row that sees nothing.
    """

    o: Float[Array, "B T H V"]
    offset: Float[Array, "B H T"]
    peak: Float[Array, "B H T"]


def block_keys(shape: Shape) -> int:
    """Keys per block: as many as shared memory has room for."""
    width = shape.nope + shape.shared
    rows = 2 * ROWS * (width + (shape.value if shape.value != shape.nope else 0))
    return next(n for n in (128, 64) if rows + 2 * STAGES * n * (width + shape.value) <= SHARED_BYTES)


def forward(
    shape: Shape,
    q: Float[Array, "B T H K"],
    kv: Float[Array, "B T H NV"],
    k_shared: Float[Array, "B T P"] | None,
    spans: Int[Array, "B N 4"],
    ids: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None,
    *,
    scale: float,
) -> Result:
    """Runs causal attention, one block of queries of one head per thread block.

    Args:
      q: bfloat16 or float16.
      kv: own part of the keys, and values, side by side.
      spans: `key_spans` of blocks of ROWS queries and `block_keys(shape)` keys.
      ids: documents of the queries and of the keys, padded to whole blocks, no query and key both padding with one id;
        None: one document.
      scale: factor on the logits, positive.
    """
    keys, num_parts, dtype = block_keys(shape), len(shape.parts), q.dtype
    B, T, H, N, P, V = shape
    packed, tall = ids is not None, (HEIGHT, keys)
    log2_scale = scale * LOG2E

    def mla_forward(*refs):
        refs = list(refs)
        q_gmem, kv_gmem = refs.pop(0), refs.pop(0)
        shared_gmem = refs.pop(0) if P else None
        spans_gmem = refs.pop(0)
        query_ids_gmem, key_ids_gmem = (refs.pop(0), refs.pop(0)) if packed else (None, None)
        outputs, refs = refs[:3], refs[3:]
        q_s, k_s, v_s, ids_s, o_s, vectors_s, arrived, k_full, v_full, k_free, v_free = refs
        o_s = q_s[0] if o_s is None else o_s
        team, h = lax.axis_index("team"), lax.axis_index("head")
        b, n = lax.axis_index("batch"), lax.axis_index("block")
        n = spans.shape[1] - 1 - n  # the longest first
        span = read_span(spans_gmem, b if packed else 0, n)

        def compute():
            start = n * ROWS + team * HEIGHT
            rows = pl.ds(start, HEIGHT)
            for (first, width), target in zip(shape.parts, q_s, strict=True):
                load_gmem(q_gmem.at[b, rows, h, pl.ds(first, width)], arrived.at[team], target.at[team])
            if packed:
                row_ids = plgpu.load(query_ids_gmem.at[b, rows], layout=BY_ROW, optimized=False)
            plgpu.barrier_wait(arrived.at[team])

            def step(i, carry, *, masked):
                o, peak, total = carry
                slot = lax.rem(i, STAGES)
                plgpu.barrier_wait(k_full.at[slot])
                pairs = [(q_part.at[team], k_part.at[slot].T) for q_part, k_part in zip(q_s, k_s, strict=True)]
                (s,) = add_products((zeros(*tall), pairs))
                if masked:
                    documents = (row_ids, ids_s.at[slot]) if packed else None
                    seen = visible(tall, start, span.block(i) * keys, documents, rows_are_keys=False)
                    s = jnp.where(seen, s, -jnp.inf)
                plgpu.barrier_arrive(k_free.at[slot])
                new_peak = jnp.maximum(peak, jnp.max(s, 1) * log2_scale)
                decay = jnp.exp2(peak - new_peak)
                p = jnp.exp2(s * log2_scale - spread_rows(new_peak, tall))
                total = total * decay + jnp.sum(p, 1)
                o = o * spread_rows(decay, o.shape)
                p16 = p.astype(dtype)
                o, total, new_peak, p16 = lax.optimization_barrier((o, total, new_peak, p16))
                plgpu.barrier_wait(v_full.at[slot])
                (o,) = add_products((o, [(p16, v_s.at[slot])]))
                plgpu.barrier_arrive(v_free.at[slot])
                return o, new_peak, total

            flat = lambda value: plgpu.layout_cast(jnp.full((HEIGHT,), value, f32), BY_ROW)
            carry = zeros(HEIGHT, V), flat(NOTHING), flat(0.0)
            carry = lax.fori_loop(0, span.num_masked, lambda i, c: step(i, c, masked=True), carry)
            carry = lax.fori_loop(span.num_masked, span.num_blocks, lambda i, c: step(i, c, masked=False), carry)
            o, peak, total = carry
            some = peak > 0.5 * NOTHING
            weight = jnp.where(some, 1.0 / total, 0.0)
            o_s.at[team][...] = (o * spread_rows(weight, o.shape)).astype(dtype)
            vectors_s.at[team, 0][...] = jnp.where(some, -(peak + lax.log(total) * LOG2E) / log2_scale, NO_KEY)
            vectors_s.at[team, 1][...] = jnp.where(some, peak, NOTHING)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[team], outputs[0].at[b, rows, h])
            for i, target in enumerate(outputs[1:]):
                plgpu.copy_smem_to_gmem(vectors_s.at[team, i], target.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            buffers = KeyBuffers(k_s, v_s, ids_s, k_full, v_full, k_free, v_free)
            copy_keys(shape, span, keys, STAGES, (kv_gmem, shared_gmem, key_ids_gmem), buffers, b, h)

        split_roles(team, compute, copy)

    struct = jax.ShapeDtypeStruct
    vector = struct((B, H, shape.padded), f32)
    launch = plgpu.kernel(
        mla_forward,
        out_type=[struct((B, T, H, V), dtype), vector, vector],
        grid=(B, H, spans.shape[1]),
        grid_names=("batch", "head", "block"),
        num_threads=TEAMS + 1,
        thread_name="team",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            [tile(TEAMS, HEIGHT, width, dtype=dtype) for _, width in shape.parts],
            [tile(STAGES, keys, width, dtype=dtype) for _, width in shape.parts],
            tile(STAGES, keys, V, dtype=dtype),
            plgpu.SMEM((STAGES, keys), i32) if packed else None,
            tile(TEAMS, HEIGHT, V, dtype=dtype) if V != N else None,
            plgpu.SMEM((TEAMS, 2, HEIGHT), f32),
            plgpu.Barrier(num_arrivals=num_parts, num_barriers=TEAMS),
            plgpu.Barrier(num_arrivals=num_parts + packed, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=TEAMS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=TEAMS, num_barriers=STAGES),
        ],
    )
    return Result(*launch(q, kv, *([k_shared] if P else []), spans, *(ids or ())))
