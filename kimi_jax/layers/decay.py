"""Decay gates: one module per config type; where the log-decay of every token comes from and how it starts."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kimi_jax.config.mixer import (
    TIME_STEP,
    ChannelDecay,
    Decay,
    Gate,
    HeadDecay,
    LinearMixer,
    LowerBound,
    NoDecay,
    Softplus,
)
from kimi_jax.layers.linear import project
from kimi_jax.layers.param import normal, param, uniform
from pallas_kernels.kda.api import LowerBoundGate, SoftplusGate

type OperatorGate = SoftplusGate | LowerBoundGate | None


def draw_log_rate(rngs: nnx.Rngs, num_heads: int) -> Float[Array, "HV"]:
    """a_log = log U(1, 16), one per head."""
    return jnp.log(uniform(rngs, (num_heads,), 1.0, 16.0))


def draw_time_step(rngs: nnx.Rngs, shape: tuple[int, ...], least: float, most: float) -> Float[Array, "..."]:
    """Time steps, log-uniform in [least, most]."""
    return jnp.exp(uniform(rngs, shape, math.log(least), math.log(most)))


class SoftplusParams(nnx.Module):
    """a_log and dt_bias of g = -exp(a_log) softplus(raw + dt_bias), starting at softplus(dt_bias) = dt."""

    def __init__(self, cfg: Softplus, *, shape: tuple[int, int], rngs: nnx.Rngs):
        dt = draw_time_step(rngs, shape, *cfg.time_step)
        self.a_log = param(draw_log_rate(rngs, shape[0]), axes=("heads",))
        self.dt_bias = param(dt + jnp.log(-jnp.expm1(-dt)), axes=("heads", "head_dim"))

    def values(self) -> SoftplusGate:
        return SoftplusGate(self.a_log[...], self.dt_bias[...])


class LowerBoundParams(nnx.Module):
    """a_log and dt_bias of g = bound sigmoid(exp(a_log) (raw + dt_bias)).

    Starts at slope 1 with dt_bias such that g at raw = 0 has the distribution that the softplus gate starts with, kept
    within half of the bound.
    """

    def __init__(self, cfg: LowerBound, *, shape: tuple[int, int], rngs: nnx.Rngs):
        self.bound = cfg.bound
        rate = jnp.exp(draw_log_rate(rngs, shape[0]))[:, None] * draw_time_step(rngs, shape, *TIME_STEP)
        fraction = jnp.minimum(rate / -cfg.bound, 0.5)
        self.a_log = param(jnp.zeros(shape[0], jnp.float32), axes=("heads",))
        self.dt_bias = param(jnp.log(fraction) - jnp.log1p(-fraction), axes=("heads", "head_dim"))

    def values(self) -> LowerBoundGate:
        return LowerBoundGate(self.a_log[...], self.dt_bias[...], self.bound)


GATES = {Softplus: SoftplusParams, LowerBound: LowerBoundParams}


def build_gate(cfg: Gate, *, shape: tuple[int, int], rngs: nnx.Rngs) -> SoftplusParams | LowerBoundParams:
    """Builds the parameters of a `gate:` config; `shape` is that of dt_bias."""
    return GATES[type(cfg)](cfg, shape=shape, rngs=rngs)


class ChannelDecayGate(nnx.Module):
    """One decay per key channel: a raw logit through a bottleneck of rank R; the operator applies the gate."""

    def __init__(self, cfg: ChannelDecay, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        HV, K = mixer.value_heads, mixer.key_dim
        self.down = param(normal(rngs, (model_dim, cfg.rank), std), axes=("embed", "rank"))
        self.up = param(normal(rngs, (cfg.rank, HV, K), std), axes=("rank", "heads", "head_dim"))
        self.gate = build_gate(cfg.gate, shape=(HV, K), rngs=rngs)

    @property
    def narrow(self) -> Float[Array, "D R"]:
        return self.down[...]

    @jax.named_scope("decay")
    def __call__(
        self, x_BTD: Float[Array, "B T D"], low_BTR: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T HV K"], OperatorGate]:
        return project("BTR,RHK->BTHK", low_BTR, self.up[...]), self.gate.values()


class HeadDecayGate(nnx.Module):
    """One decay per head, straight from the input."""

    narrow = None

    def __init__(self, cfg: HeadDecay, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.key_dim = mixer.key_dim
        self.weight = param(normal(rngs, (model_dim, mixer.value_heads), std), axes=("embed", "heads"))
        self.gate = build_gate(cfg.gate, shape=(mixer.value_heads, 1), rngs=rngs)

    @jax.named_scope("decay")
    def log_decay(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T HV"]:
        """Returns g in nats, float32, <= 0."""
        weight = self.weight[...].astype(x_BTD.dtype)
        raw_BTH = jnp.einsum("BTD,DH->BTH", x_BTD, weight, preferred_element_type=jnp.float32)
        return self.gate.values().log_decay(raw_BTH[..., None])[..., 0]

    def __call__(self, x_BTD: Float[Array, "B T D"], low: None) -> tuple[Float[Array, "B T HV K"], OperatorGate]:
        g_BTH = self.log_decay(x_BTD)
        return jnp.broadcast_to(g_BTH[..., None], (*g_BTH.shape, self.key_dim)), None


class NoDecayGate(nnx.Module):
    """g = 0: nothing is forgotten."""

    narrow = None

    def __init__(self, cfg: NoDecay, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.shape = (mixer.value_heads, mixer.key_dim)

    def __call__(self, x_BTD: Float[Array, "B T D"], low: None) -> tuple[Float[Array, "B T HV K"], OperatorGate]:
        return jnp.zeros((*x_BTD.shape[:2], *self.shape), jnp.float32), None


DECAYS = {ChannelDecay: ChannelDecayGate, HeadDecay: HeadDecayGate, NoDecay: NoDecayGate}


def build_decay(
    cfg: Decay, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs
) -> ChannelDecayGate | HeadDecayGate | NoDecayGate:
    """Builds the module of a `decay:` config: (x, x times its `narrow` matrix if it has one) -> (log-decay, None), or
    (raw logit, gate for the operator to apply)."""
    return DECAYS[type(cfg)](cfg, mixer, model_dim=model_dim, std=std, rngs=rngs)
