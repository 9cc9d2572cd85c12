"""Dense SwiGLU in plain JAX: a product, then a pass; any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu_product(
    x: Float[Array, "B T D"], gate: Float[Array, "D F"], up: Float[Array, "D F"]
) -> tuple[Float[Array, "B T F"], Float[Array, "B T 2 F"]]:
    """See `pallas_kernels.swiglu.api.swiglu_product`; one product reads x."""
    both = jnp.einsum("BTD,DGF->BTGF", x, jnp.stack([gate, up], axis=1))
    return swiglu(both), both


def swiglu(both: Float[Array, "*B 2 F"]) -> Float[Array, "*B F"]:
    """silu(g) u of both, computed in float32 and rounded once."""
    gate, up = (both[..., i, :].astype(jnp.float32) for i in range(2))
    return (gate * jax.nn.sigmoid(gate) * up).astype(both.dtype)


def swiglu_product_gradient(
    dy: Float[Array, "B T D"], down: Float[Array, "F D"], both: Float[Array, "B T 2 F"]
) -> Float[Array, "B T 2 F"]:
    """See `pallas_kernels.swiglu.api.swiglu_product_gradient`.

    One expression for each number of the result: what two had in common XLA would write to memory first.
    """
    both = jax.lax.optimization_barrier(both)
    d_hidden = jnp.einsum("BTD,FD->BTF", dy, down)
    wide = lambda x: jnp.broadcast_to(x.astype(jnp.float32), both.shape)
    gate, up, d_hidden = (wide(x) for x in (both[..., :1, :], both[..., 1:, :], d_hidden[..., None, :]))
    sigmoid = jax.nn.sigmoid(gate)
    of_gate = jax.lax.broadcasted_iota(jnp.int32, both.shape, both.ndim - 2) == 0
    return (d_hidden * sigmoid * jnp.where(of_gate, up * (1 + gate * (1 - sigmoid)), gate)).astype(both.dtype)
