"""From the heads' outputs back to the residual stream: RMSNorm per head, output gate, projection."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kimi_jax.config.mixer import LinearMixer, NoGate, OutputGate, SigmoidGate, SwishGate
from kimi_jax.layers.linear import project
from kimi_jax.layers.norm import rms_normalize
from kimi_jax.layers.param import normal, param
from pallas_kernels.gated_norm.api import gated_rms_norm

ACTIVATIONS = {SigmoidGate: "sigmoid", SwishGate: "silu"}


class LowRankGate(nnx.Module):
    """RMSNorm times activation(z), z from the layer's input through a bottleneck of rank R."""

    def __init__(self, cfg: SigmoidGate | SwishGate, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        HV, V = mixer.value_heads, mixer.value_dim
        self.activation = ACTIVATIONS[type(cfg)]
        self.down = param(normal(rngs, (model_dim, cfg.rank), std), axes=("embed", "rank"))
        self.up = param(normal(rngs, (cfg.rank, HV, V), std), axes=("rank", "heads", "head_dim"))

    @property
    def narrow(self) -> Float[Array, "D R"]:
        return self.down[...]

    def __call__(
        self, o_BTHV: Float[Array, "B T HV V"], low_BTR: Float[Array, "B T R"], gain_V: Float[Array, "V"], eps: float
    ) -> Float[Array, "B T HV V"]:
        z_BTHV = project("BTR,RHV->BTHV", low_BTR, self.up[...])
        return gated_rms_norm(o_BTHV, z_BTHV, gain_V, eps=eps, activation=self.activation)


class Ungated(nnx.Module):
    """RMSNorm alone."""

    narrow = None

    def __init__(self, cfg: NoGate, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        del cfg, mixer, model_dim, std, rngs

    def __call__(
        self, o_BTHV: Float[Array, "B T HV V"], low: None, gain_V: Float[Array, "V"], eps: float
    ) -> Float[Array, "B T HV V"]:
        return (rms_normalize(o_BTHV, eps) * gain_V[None, None, None, :]).astype(o_BTHV.dtype)


OUTPUT_GATES = {SigmoidGate: LowRankGate, SwishGate: LowRankGate, NoGate: Ungated}


def build_output_gate(
    cfg: OutputGate, mixer: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs
) -> LowRankGate | Ungated:
    """Builds the module of an `output_gate:` config."""
    return OUTPUT_GATES[type(cfg)](cfg, mixer, model_dim=model_dim, std=std, rngs=rngs)


class GatedOutput(nnx.Module):
    """W_o [RMSNorm_per_head(o) * gain * gate(x)]; all but the projections in float32."""

    def __init__(self, cfg: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        HV, V = cfg.value_heads, cfg.value_dim
        self.eps = cfg.norm_eps
        self.norm = param(jnp.ones(V, jnp.float32), axes=("head_dim",))
        self.gate = build_output_gate(cfg.output_gate, cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.weight = param(normal(rngs, (HV, V, model_dim), std), axes=("heads", "head_dim", "embed"))

    @jax.named_scope("output")
    def __call__(
        self, o_BTHV: Float[Array, "B T HV V"], low_BTR: Float[Array, "B T R"] | None
    ) -> Float[Array, "B T D"]:
        """`low_BTR`: the layer's input times the gate's `narrow` matrix, if it has one."""
        gated = self.gate(o_BTHV, low_BTR, self.norm[...], self.eps)
        return project("BTHV,HVD->BTD", gated, self.weight[...])
