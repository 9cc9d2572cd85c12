"""The largest values and their places as JAX has them: by sorting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k(
    values: Float[Array, "B T E"], bias: Float[Array, "E"], *, k: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
    """See `pallas_kernels.top_k.api.top_k`."""
    places = jax.lax.top_k(values + bias[None, None], k)[1]
    return places, jnp.take_along_axis(values, places, -1)
