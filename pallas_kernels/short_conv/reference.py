"""Short convolution token by token in plain JAX: the definition that every implementation must match."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import segment_starts


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    cache: Float[Array, "B W-1 D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """See `pallas_kernels.short_conv.api.short_conv`; gradients by automatic differentiation of the scan."""
    (B, T, D), W = x.shape, weight.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    valid, starts = ids != 0, segment_starts(ids)
    weight = weight.astype(dtype)

    def token(last, inputs):
        x, valid, start = inputs
        last = jnp.where(start[:, None, None], 0, last)
        window = jnp.concatenate([last, jnp.where(valid[:, None], x, 0)[:, None]], axis=1)
        y = jax.nn.silu(jnp.einsum("BWD,DW->BD", window, weight))
        return jnp.where(valid[:, None, None], window[:, 1:], last), jnp.where(valid[:, None], y, 0)

    first = jnp.zeros((B, W - 1, D), dtype) if cache is None else cache.astype(dtype)
    xs = (x.astype(dtype), valid, starts)
    last, y = jax.lax.scan(token, first, tuple(jnp.moveaxis(a, 1, 0) for a in xs))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), last.astype(x.dtype)
