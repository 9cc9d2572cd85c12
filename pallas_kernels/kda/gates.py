"""The two gates that turn a raw logit into a log-decay per key channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class SoftplusGate(NamedTuple):
    """g = -exp(a_log) softplus(raw + dt_bias): unbounded below; the released Kimi Linear.

    Args:
      a_log: natural log of the decay rate per value head, float32.
      dt_bias: offset per value head and key channel, float32.
    """

    a_log: Float[Array, "HV"]
    dt_bias: Float[Array, "HV K"]

    def log_decay(self, raw: Float[Array, "*B HV K"]) -> Float[Array, "*B HV K"]:
        """Returns g in nats, float32 (float64 for a float64 logit), <= 0."""
        dtype = jnp.promote_types(raw.dtype, jnp.float32)
        rate = jnp.exp(self.a_log.astype(dtype))[:, None]
        return -rate * jax.nn.softplus(raw.astype(dtype) + self.dt_bias.astype(dtype))


class LowerBoundGate(NamedTuple):
    """g = bound * sigmoid(exp(a_log) (raw + dt_bias)): never below `bound`; Kimi K3 and GLM-5.3-Flash.

    Args:
      a_log: natural log of the slope per value head, float32; None: slope 1.
      dt_bias: offset per value head and key channel, float32.
      bound: the smallest log-decay, negative; not differentiated.
    """

    a_log: Float[Array, "HV"] | None
    dt_bias: Float[Array, "HV K"]
    bound: float = -5.0

    def log_decay(self, raw: Float[Array, "*B HV K"]) -> Float[Array, "*B HV K"]:
        """Returns g in nats, float32 (float64 for a float64 logit), in [bound, 0]."""
        dtype = jnp.promote_types(raw.dtype, jnp.float32)
        z = raw.astype(dtype) + self.dt_bias.astype(dtype)
        if self.a_log is not None:
            z = jnp.exp(self.a_log.astype(dtype))[:, None] * z
        return self.bound * jax.nn.sigmoid(z)


type Gate = SoftplusGate | LowerBoundGate | None
