"""Scalar-decay linear attention token by token in plain JAX: the definition that every implementation must match."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import segment_starts


def chunk_ssd(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float,
    initial_state: Float[Array, "B HV V K"] | None,
    segment_ids: Int[Array, "B T"] | None,
    tile: int | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"]]:
    """See `pallas_kernels.ssd.api.chunk_ssd`; gradients by automatic differentiation of the scan."""
    del tile  # one token at a time
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    valid, starts = ids != 0, segment_starts(ids)

    def clean(x):  # padding may hold anything
        return jnp.where(valid.reshape(B, T, *(1,) * (x.ndim - 2)), x, 0).astype(dtype)

    q, k, v_wide, g, beta = map(clean, (q, k, v, g, beta))
    q, k = (jnp.repeat(x, HV // H, axis=2) for x in (q * scale, k))

    def token(state, inputs):
        start, q, k, v, g, beta = inputs
        state = jnp.where(start[:, None, None, None], 0, state) * jnp.exp(g)[..., None, None]
        state = state + (beta[..., None] * v)[..., :, None] * k[..., None, :]
        return state, jnp.einsum("BHVK,BHK->BHV", state, q, precision=jax.lax.Precision.HIGHEST)

    first = jnp.zeros((B, HV, V, K), dtype) if initial_state is None else initial_state.astype(dtype)
    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (starts, q, k, v_wide, g, beta))
    final, o = jax.lax.scan(token, first, xs)
    return clean(jnp.moveaxis(o, 0, 1)).astype(v.dtype), final
