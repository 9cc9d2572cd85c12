"""The two gates that turn a raw logit into a log-decay per key channel."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _align(parameter: Float[Array, "HV _"], raw: Float[Array, "*B HV K"]) -> Float[Array, "*_ HV _"]:
    """Leading axes of length 1, and the dtype in which the gate of `raw` is computed."""
    dtype = jnp.promote_types(raw.dtype, jnp.float32)
    return jnp.expand_dims(parameter.astype(dtype), range(raw.ndim - 2))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("a_log", "dt_bias"), meta_fields=())
@dataclass(frozen=True)
class SoftplusGate:
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
        rate, bias = jnp.exp(_align(self.a_log[:, None], raw)), _align(self.dt_bias, raw)
        return -rate * jax.nn.softplus(raw.astype(dtype) + bias)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("a_log", "dt_bias"), meta_fields=("bound",))
@dataclass(frozen=True)
class LowerBoundGate:
    """g = bound * sigmoid(exp(a_log) (raw + dt_bias)): never below `bound`; Kimi K3 and GLM-5.3-Flash.

    Args:
      a_log: natural log of the slope per value head, float32; None: slope 1.
      dt_bias: offset per value head and key channel, float32.
      bound: the smallest log-decay, negative; fixed at trace time.
    """

    a_log: Float[Array, "HV"] | None
    dt_bias: Float[Array, "HV K"]
    bound: float = -5.0

    def log_decay(self, raw: Float[Array, "*B HV K"]) -> Float[Array, "*B HV K"]:
        """Returns g in nats, float32 (float64 for a float64 logit), in [bound, 0]."""
        dtype = jnp.promote_types(raw.dtype, jnp.float32)
        z = raw.astype(dtype) + _align(self.dt_bias, raw)
        if self.a_log is not None:
            z = jnp.exp(_align(self.a_log[:, None], raw)) * z
        return self.bound * jax.nn.sigmoid(z)


type Gate = SoftplusGate | LowerBoundGate | None


def log_decay_of_rows(gate: Gate, raw: Float[Array, "B T HV K"]) -> Float[Array, "B T HV K"]:
    """`gate.log_decay` with a gate per row of the batch: a_log [B, HV], dt_bias [B, HV, K]."""
    return jax.vmap(lambda gate, raw: gate.log_decay(raw))(gate, raw)
