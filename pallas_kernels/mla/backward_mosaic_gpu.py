"""Attention on Hopper, backward: one kernel per block of queries, one per block of keys, so that nothing is added
across thread blocks and two runs are bit-equal."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla.tiles import (
    BY_COLUMN,
    BY_ROW,
    HEIGHT,
    LOG2E,
    ROWS,
    SHARED_BYTES,
    TEAMS,
    KeyBuffers,
    Shape,
    add_products,
    copy_keys,
    drain,
    f32,
    hidden_zero,
    i32,
    key_sources,
    load_gmem,
    read_span,
    split_roles,
    spread_columns,
    spread_rows,
    tile,
    visible,
    zeros,
)

BLOCK_KEYS = 64  # of the gradient of the queries
BLOCK_QUERIES = 64  # of the gradients of the keys


def query_gradient(
    shape: Shape,
    q: Float[Array, "B T H K"],
    kv: Float[Array, "B T H NV"],
    k_shared: Float[Array, "B T P"] | None,
    do: Float[Array, "B T H V"],
    offset: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    spans: Int[Array, "B N 4"],
    ids: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None,
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    """Gradient of the queries: a thread block owns ROWS queries of one head and walks over their keys.

    Args:
      offset: of the forward pass.
      delta: minus the sum over channels of o do, float32, padded like `offset`.
      spans: `key_spans` of blocks of ROWS queries and BLOCK_KEYS keys.
    """
    num_parts, dtype, stages = len(shape.parts), q.dtype, _stages(shape, BLOCK_KEYS)
    B, _, H, _, P, V = shape
    packed, tall = ids is not None, (HEIGHT, BLOCK_KEYS)

    def mla_query_gradient(*refs):
        refs = list(refs)
        q_gmem, kv_gmem = refs.pop(0), refs.pop(0)
        shared_gmem = refs.pop(0) if P else None
        do_gmem, offset_gmem, delta_gmem, spans_gmem = (refs.pop(0) for _ in range(4))
        query_ids_gmem, key_ids_gmem = (refs.pop(0), refs.pop(0)) if packed else (None, None)
        dq_gmem, q_s, do_s, k_s, v_s, ids_s, vectors_s, arrived, k_full, v_full, k_free, v_free = refs
        team, b, h = lax.axis_index("team"), lax.axis_index("batch"), lax.axis_index("head")
        n = spans.shape[1] - 1 - lax.axis_index("block")  # the longest first
        span = read_span(spans_gmem, b if packed else 0, n)

        def compute():
            start = n * ROWS + team * HEIGHT
            rows = pl.ds(start, HEIGHT)
            for (first, width), target in zip(shape.parts, q_s, strict=True):
                load_gmem(q_gmem.at[b, rows, h, pl.ds(first, width)], arrived.at[team], target.at[team])
            load_gmem(do_gmem.at[b, rows, h], arrived.at[team], do_s.at[team])
            plgpu.copy_gmem_to_smem(offset_gmem.at[b, h, rows], vectors_s.at[team, 0], arrived.at[team])
            plgpu.copy_gmem_to_smem(delta_gmem.at[b, h, rows], vectors_s.at[team, 1], arrived.at[team])
            if packed:
                row_ids = plgpu.load(query_ids_gmem.at[b, rows], layout=BY_ROW, optimized=False)
            plgpu.barrier_wait(arrived.at[team])
            row_offset = plgpu.load(vectors_s.at[team, 0], layout=BY_ROW)
            row_delta = plgpu.load(vectors_s.at[team, 1], layout=BY_ROW)

            def step(i, gradient, *, masked):
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                s, dp = add_products(
                    (
                        spread_rows(row_offset, tall),
                        [(x.at[team], k.at[slot].T) for x, k in zip(q_s, k_s, strict=True)],
                    ),
                    (spread_rows(row_delta, tall), [(do_s.at[team], v_s.at[slot].T)]),
                )
                plgpu.barrier_arrive(v_free.at[slot])
                p = jnp.exp2(s * (scale * LOG2E))
                if masked:
                    documents = (row_ids, ids_s.at[slot]) if packed else None
                    seen = visible(tall, start, span.block(i) * BLOCK_KEYS, documents, rows_are_keys=False)
                    p = jnp.where(seen, p, 0.0)
                ds = (p * dp).astype(dtype)
                gradient = add_products(*((d, [(ds, k.at[slot])]) for d, k in zip(gradient, k_s, strict=True)))
                plgpu.barrier_arrive(k_free.at[slot])
                return gradient

            gradient = tuple(zeros(HEIGHT, width) for _, width in shape.parts)
            gradient = lax.fori_loop(0, span.num_masked, lambda i, d: step(i, d, masked=True), gradient)
            gradient = lax.fori_loop(span.num_masked, span.num_blocks, lambda i, d: step(i, d, masked=False), gradient)
            for d, target in zip(gradient, q_s, strict=True):
                target.at[team][...] = (d * scale).astype(dtype)
            plgpu.commit_smem()
            for (first, width), source in zip(shape.parts, q_s, strict=True):
                plgpu.copy_smem_to_gmem(source.at[team], dq_gmem.at[b, rows, h, pl.ds(first, width)])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            buffers = KeyBuffers(k_s, v_s, ids_s, k_full, v_full, k_free, v_free)
            copy_keys(shape, span, BLOCK_KEYS, stages, (kv_gmem, shared_gmem, key_ids_gmem), buffers, b, h)

        split_roles(team, compute, copy)

    launch = plgpu.kernel(
        mla_query_gradient,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(B, H, spans.shape[1]),
        grid_names=("batch", "head", "block"),
        num_threads=TEAMS + 1,
        thread_name="team",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=[
            [tile(TEAMS, HEIGHT, width, dtype=dtype) for _, width in shape.parts],
            tile(TEAMS, HEIGHT, V, dtype=dtype),
            [tile(stages, BLOCK_KEYS, width, dtype=dtype) for _, width in shape.parts],
            tile(stages, BLOCK_KEYS, V, dtype=dtype),
            plgpu.SMEM((stages, BLOCK_KEYS), i32) if packed else None,
            plgpu.SMEM((TEAMS, 2, HEIGHT), f32),
            plgpu.Barrier(num_arrivals=num_parts + 3, num_barriers=TEAMS),
            plgpu.Barrier(num_arrivals=num_parts + packed, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=TEAMS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=TEAMS, num_barriers=stages),
        ],
    )
    return launch(q, kv, *([k_shared] if P else []), do, offset, delta, spans, *(ids or ()))


def key_gradients(
    shape: Shape,
    q: Float[Array, "B T H K"],
    kv: Float[Array, "B T H NV"],
    k_shared: Float[Array, "B T P"] | None,
    do: Float[Array, "B T H V"],
    offset: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    spans: Int[Array, "B N 4"],
    ids: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T H NV"], Float[Array, "B T H P"] | None]:
    """Gradients of keys and values: a thread block owns ROWS keys of one head and walks over the queries that see them.

    Args:
      spans: `query_spans` of blocks of ROWS keys and BLOCK_QUERIES queries.

    Returns:
      (gradient of kv, gradient of the shared keys for every head).
    """
    num_parts, dtype, stages = len(shape.parts), q.dtype, _stages(shape, BLOCK_QUERIES)
    B, T, H, N, P, V = shape
    packed, tall = ids is not None, (HEIGHT, BLOCK_QUERIES)

    def mla_key_gradients(*refs):
        refs = list(refs)
        q_gmem, kv_gmem = refs.pop(0), refs.pop(0)
        shared_gmem = refs.pop(0) if P else None
        do_gmem, offset_gmem, delta_gmem, spans_gmem = (refs.pop(0) for _ in range(4))
        query_ids_gmem, key_ids_gmem = (refs.pop(0), refs.pop(0)) if packed else (None, None)
        dkv_gmem = refs.pop(0)
        dshared_gmem = refs.pop(0) if P else None
        k_s, v_s, q_s, do_s, ids_s, offset_s, delta_s, arrived, q_full, do_full, q_free, do_free = refs
        team, b, h = lax.axis_index("team"), lax.axis_index("batch"), lax.axis_index("head")
        n = lax.axis_index("block")
        span = read_span(spans_gmem, b if packed else 0, n)

        def compute():
            start = n * ROWS + team * HEIGHT
            rows = pl.ds(start, HEIGHT)
            for source, target in zip(key_sources(shape, kv_gmem, shared_gmem, b, rows, h), k_s, strict=True):
                load_gmem(source, arrived.at[team], target.at[team])
            load_gmem(kv_gmem.at[b, rows, h, pl.ds(N, V)], arrived.at[team], v_s.at[team])
            if packed:
                row_ids = plgpu.load(key_ids_gmem.at[b, rows], layout=BY_ROW, optimized=False)
            plgpu.barrier_wait(arrived.at[team])

            def step(i, gradient, *, masked):
                dk, dv = gradient
                slot, mine = lax.rem(i, stages), team + hidden_zero()
                plgpu.barrier_wait(q_full.at[slot])
                offset = spread_columns(plgpu.load(offset_s.at[slot], layout=BY_COLUMN), tall)
                pairs = [(k.at[mine], x.at[slot].T) for k, x in zip(k_s, q_s, strict=True)]
                (s,) = add_products((offset, pairs))
                p = jnp.exp2(s * (scale * LOG2E))
                if masked:
                    documents = (row_ids, ids_s.at[slot]) if packed else None
                    seen = visible(tall, start, span.block(i) * BLOCK_QUERIES, documents, rows_are_keys=True)
                    p = jnp.where(seen, p, 0.0)
                p = p.astype(dtype)
                plgpu.barrier_wait(do_full.at[slot])
                (dv,) = add_products((dv, [(p, do_s.at[slot])]))
                delta = spread_columns(plgpu.load(delta_s.at[slot], layout=BY_COLUMN), tall)
                (dp,) = add_products((delta, [(v_s.at[mine], do_s.at[slot].T)]))
                plgpu.barrier_arrive(do_free.at[slot])
                # The probabilities as rounded for dv: 16 registers a thread instead of 32.
                ds = (p.astype(f32) * dp).astype(dtype)
                dk = add_products(*((d, [(ds, x.at[slot])]) for d, x in zip(dk, q_s, strict=True)))
                plgpu.barrier_arrive(q_free.at[slot])
                return dk, dv

            gradient = tuple(zeros(HEIGHT, width) for _, width in shape.parts), zeros(HEIGHT, V)
            gradient = lax.fori_loop(0, span.num_masked, lambda i, d: step(i, d, masked=True), gradient)
            gradient = lax.fori_loop(span.num_masked, span.num_blocks, lambda i, d: step(i, d, masked=False), gradient)
            dk, dv = gradient
            for d, target in zip(dk, k_s, strict=True):
                target.at[team][...] = (d * scale).astype(dtype)
            v_s.at[team][...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s[0].at[team], dkv_gmem.at[b, rows, h, pl.ds(0, N)])
            if P:
                plgpu.copy_smem_to_gmem(k_s[1].at[team], dshared_gmem.at[b, rows, h])
            plgpu.copy_smem_to_gmem(v_s.at[team], dkv_gmem.at[b, rows, h, pl.ds(N, V)])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            @pl.loop(0, span.num_blocks)
            def _(i):
                slot = lax.rem(i, stages)
                rows = pl.ds(span.block(i) * BLOCK_QUERIES, BLOCK_QUERIES)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                for (first, width), target in zip(shape.parts, q_s, strict=True):
                    load_gmem(q_gmem.at[b, rows, h, pl.ds(first, width)], q_full.at[slot], target.at[slot])
                plgpu.copy_gmem_to_smem(offset_gmem.at[b, h, rows], offset_s.at[slot], q_full.at[slot])
                if packed:
                    plgpu.copy_gmem_to_smem(query_ids_gmem.at[b, rows], ids_s.at[slot], q_full.at[slot])
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                load_gmem(do_gmem.at[b, rows, h], do_full.at[slot], do_s.at[slot])
                plgpu.copy_gmem_to_smem(delta_gmem.at[b, h, rows], delta_s.at[slot], do_full.at[slot])

            drain(span.num_blocks, stages, q_free, do_free)

        split_roles(team, compute, copy)

    struct = jax.ShapeDtypeStruct
    launch = plgpu.kernel(
        mla_key_gradients,
        out_type=[struct(kv.shape, dtype), *([struct((B, T, H, P), dtype)] if P else [])],
        grid=(B, H, spans.shape[1]),
        grid_names=("batch", "head", "block"),
        num_threads=TEAMS + 1,
        thread_name="team",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=[
            [tile(TEAMS, HEIGHT, width, dtype=dtype) for _, width in shape.parts],
            tile(TEAMS, HEIGHT, V, dtype=dtype),
            [tile(stages, BLOCK_QUERIES, width, dtype=dtype) for _, width in shape.parts],
            tile(stages, BLOCK_QUERIES, V, dtype=dtype),
            plgpu.SMEM((stages, BLOCK_QUERIES), i32) if packed else None,
            plgpu.SMEM((stages, BLOCK_QUERIES), f32),
            plgpu.SMEM((stages, BLOCK_QUERIES), f32),
            plgpu.Barrier(num_arrivals=num_parts + 1, num_barriers=TEAMS),
            plgpu.Barrier(num_arrivals=num_parts + 1 + packed, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=TEAMS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=TEAMS, num_barriers=stages),
        ],
    )
    dkv, *dshared = launch(q, kv, *([k_shared] if P else []), do, offset, delta, spans, *(ids or ()))
    return dkv, dshared[0] if P else None


def _stages(shape: Shape, block: int) -> int:
    """Blocks in shared memory, beside the rows that a thread block owns."""
    width = 2 * (shape.nope + shape.shared + shape.value)
    return next(n for n in (3, 2) if width * (ROWS + n * block) <= SHARED_BYTES)
