"""The products in plain JAX: all of a symmetric result is computed."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def gram(x: Float[Array, "N R C"]) -> Float[Array, "N S S"]:
    """See `api.gram`."""
    spec = "nik,njk->nij" if x.shape[1] <= x.shape[2] else "nki,nkj->nij"
    return jnp.einsum(spec, x, x)


def multiply(x: Float[Array, "N S S"], y: Float[Array, "N S S"]) -> Float[Array, "N S S"]:
    """See `api.multiply`."""
    return x @ y


def quadratic(x: Float[Array, "N S S"], *, a: float, b: float, c: float) -> Float[Array, "N S S"]:
    """See `api.quadratic`; the three terms are added in one pass."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    square = jnp.einsum("nij,njk->nik", x, x, preferred_element_type=wide)
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=wide), x.shape)
    return (a * eye + b * x.astype(wide) + c * square).astype(x.dtype)


def apply(q: Float[Array, "N S S"], x: Float[Array, "N R C"]) -> Float[Array, "N R C"]:
    """See `api.apply`."""
    return q @ x if x.shape[1] <= x.shape[2] else x @ q
