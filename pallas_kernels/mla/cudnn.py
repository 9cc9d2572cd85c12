"""Multi-head latent attention through cuDNN's fused attention: values widened to the head dimension of the keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.hopper import find_capability, is_absent
from pallas_kernels.mla import xla
from pallas_kernels.mla.self_attention import join_keys, join_queries, refuse_others

WIDEST = 256  # head dimension
LANES = 8  # which it is a multiple of
CAPABILITY = 9  # below, only 128 channels
MASK_BYTES = 2**31  # packed documents cost a mask of B T T 16-bit numbers


def refuse(q_nope, q_shared, k_nope, k_shared, v, *, scale, segment_ids, **masks) -> str | None:
    """Refuses what cuDNN has no kernel for, and documents whose mask would fill the memory."""
    del scale
    refusal = refuse_others(q_nope, q_shared, k_nope, k_shared, v, segment_ids=segment_ids, **masks)
    if refusal:
        return refusal
    if is_absent():
        return "needs the library of a GPU that is there, this one is only described"
    capability = find_capability()
    if float(capability) < CAPABILITY:
        return f"needs compute capability {CAPABILITY}.0, this GPU has {capability}"
    B, T, _, N = q_nope.shape
    K, V = N + q_shared.shape[-1], v.shape[-1]
    if max(K, V) > WIDEST or K % LANES or V > K:
        return f"head dimensions {K} and {V}: must be multiples of {LANES} up to {WIDEST}, values no wider than keys"
    if segment_ids is not None and T % 2:
        return f"packed documents need an even number of tokens, got {T}"
    if segment_ids is not None and 2 * B * T * T > MASK_BYTES:
        return f"packed documents need a mask of B T T numbers, too many for {B=}, {T=}"
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
    """See `pallas_kernels.mla.api.mla_attention`.

    cuDNN does not give the largest logit: it comes from a pass in plain JAX, which a `jax.jit` drops where nobody reads
    it.
    """
    masks = dict(segment_ids=segment_ids, key_segment_ids=key_segment_ids, query_offset=query_offset)
    stopped = map(jax.lax.stop_gradient, (q_nope, q_shared, k_nope, k_shared, v))
    _, max_logit = xla.mla_attention(*stopped, scale=scale, **masks)

    q, k = join_queries(q_nope, q_shared), join_keys(k_nope, k_shared)
    wide_v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - v.shape[-1])))
    mask = None if segment_ids is None else same_document(segment_ids)[:, None]
    o = jax.nn.dot_product_attention(q, k, wide_v, mask=mask, scale=scale, is_causal=True, implementation="cudnn")
    o = o[..., : v.shape[-1]]
    if segment_ids is not None:  # a row that sees nothing would get an average
        o = jnp.where((segment_ids != 0)[:, :, None, None], o, 0)
    return o, max_logit


def same_document(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Marks the keys of each query's own document."""
    return (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids != 0)[:, :, None]
