"""Multi-head latent attention on Hopper: which arguments the kernels serve, and the gradient made of two of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import refuse_device
from pallas_kernels.mla.backward_mosaic_gpu import BLOCK_KEYS, BLOCK_QUERIES, key_gradients, query_gradient
from pallas_kernels.mla.forward_mosaic_gpu import Result, block_keys, forward
from pallas_kernels.mla.self_attention import join_queries, refuse_arguments, refuse_others
from pallas_kernels.mla.spans import key_spans, query_spans
from pallas_kernels.mla.tiles import LOG2E, ROWS, Shape

CHANNELS = 64  # a part of a key, and a value, is a multiple of it
WIDEST = 192  # channels of a key or a value
COPY_ROWS = 8  # tokens are padded to a multiple of it, which the copy engine needs
NO_DOCUMENT = jnp.iinfo(jnp.int32).min  # id of padding as a query, so that it does not see padding as a key


class Options(NamedTuple):
    """What is fixed at trace time."""

    shape: Shape
    scale: float


def refuse(q_nope, q_shared, k_nope, k_shared, v, *, scale, **masks) -> str | None:
    """Refuses all but Hopper GPUs and self-attention with parts of whole tiles."""
    arrays = q_nope, q_shared, k_nope, k_shared, v
    return refuse_device() or refuse_others(*arrays, **masks) or unserved(*arrays, scale=scale, **masks)


def unserved(q_nope, q_shared, k_nope, k_shared, v, *, scale, **masks) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    refusal = refuse_arguments(q_nope, q_shared, k_nope, k_shared, v, **masks)
    if refusal:
        return refusal
    N, P, V = q_nope.shape[-1], q_shared.shape[-1], v.shape[-1]
    if any(x % CHANNELS for x in (N, P, V)) or not N or max(N + P, V) > WIDEST:
        return f"{N} + {P} key and {V} value channels: each a multiple of {CHANNELS}, at most {WIDEST} together"
    if scale <= 0:
        return f"scale={scale} must be positive"
    return None


def mla_attention(
    q_nope: Float[Array, "B T H N"],
    q_shared: Float[Array, "B T H P"],
    k_nope: Float[Array, "B T H N"],
    k_shared: Float[Array, "B T P"],
    v: Float[Array, "B T H V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B T"] | None,
    query_offset: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "H"]]:
    """See `pallas_kernels.mla.api.mla_attention`. Parts that were split from one array are read where they lie."""
    del key_segment_ids, query_offset
    T = q_nope.shape[1]
    q, kv = join_queries(q_nope, q_shared), jnp.concatenate([k_nope, v], axis=-1)
    q, kv, k_shared, segment_ids = (_pad(x, COPY_ROWS) for x in (q, kv, k_shared, segment_ids))
    B, padded, H, N = *q.shape[:3], q_nope.shape[-1]
    options = Options(Shape(B, padded, H, N, q_shared.shape[-1], v.shape[-1]), float(scale))
    o, peak = _core(options, q, kv, k_shared, segment_ids)
    return o[:, :T], jax.lax.stop_gradient(jnp.max(peak[:, :, :T], (0, 2)) / LOG2E)


def _pad(x, size: int):
    """Fills the tokens up to a multiple of `size`, with zeros."""
    if x is None or x.shape[1] % size == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0) for _ in x.shape[2:])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(options: Options, q, kv, k_shared, segment_ids):
    result = _forward(options, q, kv, k_shared, segment_ids)
    return result.o, result.peak


def _forward(options: Options, *arrays) -> Result:
    return by_rows(functools.partial(_run, options))(*arrays)


def _run(options: Options, q, kv, k_shared, segment_ids) -> Result:
    shape, scale = _shape(options, q), options.scale
    spans = key_spans(segment_ids, shape.tokens, ROWS, block_keys(shape))
    return forward(shape, q, kv, k_shared, spans, _ids(segment_ids), scale=scale)


def _shape(options: Options, q) -> Shape:
    return options.shape._replace(batch=q.shape[0])  # under `jax.vmap` the rows of all members


def _ids(segment_ids):
    """(ids of the queries, ids of the keys), padded to whole thread blocks."""
    if segment_ids is None:
        return None
    keys = _pad(segment_ids.astype(jnp.int32), ROWS)
    return jnp.where(keys == 0, NO_DOCUMENT, keys), keys


def _core_forward(options: Options, q, kv, k_shared, segment_ids):
    result = _forward(options, q, kv, k_shared, segment_ids)
    o, offset = (checkpoint_name(x, "operators") for x in (result.o, result.offset))  # kept or recomputed by that name
    return (o, result.peak), (q, kv, k_shared, segment_ids, o, offset)


def _core_backward(options: Options, residuals, cotangents):
    return *by_rows(functools.partial(_gradients, options))(*residuals, cotangents[0]), None


def _gradients(options: Options, q, kv, k_shared, segment_ids, o, offset, do):
    shape, scale = _shape(options, q), options.scale
    do, ids = do.astype(q.dtype), _ids(segment_ids)
    delta = -jnp.einsum("BTHV,BTHV->BHT", o, do, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, shape.padded - shape.tokens)))
    arrays = q, kv, k_shared, do, offset, delta
    dq = query_gradient(shape, *arrays, key_spans(segment_ids, shape.tokens, ROWS, BLOCK_KEYS), ids, scale=scale)
    spans = query_spans(segment_ids, shape.tokens, ROWS, BLOCK_QUERIES)
    dkv, dshared = key_gradients(shape, *arrays, spans, ids, scale=scale)
    if dshared is None:
        dshared = jnp.zeros_like(k_shared)
    else:
        dshared = jnp.sum(dshared, axis=2, dtype=jnp.float32).astype(k_shared.dtype)
    return dq, dkv, dshared


_core.defvjp(_core_forward, _core_backward)
