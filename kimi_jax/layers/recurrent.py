"""What the linear-attention mixers are made of, whatever operator stands in their middle, and the cache they carry."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from kimi_jax.config.mixer import Decay, LinearMixer
from kimi_jax.layers.cache import RecurrentCache
from kimi_jax.layers.decay import build_decay
from kimi_jax.layers.linear import project, project_narrow
from kimi_jax.layers.output_gate import GatedOutput
from kimi_jax.layers.qkv import ConvolvedQkv, StepSize
from pallas_kernels.partition import HEAD_AXES, free_axes_of


class Narrow(NamedTuple):
    """Matrices of few columns, or the layer's input times each of them; None: that part has none."""

    decay: Float[Array, "... R"] | None
    beta: Float[Array, "... HV"]
    output: Float[Array, "... R"] | None


class RecurrentMixer(nnx.Module):
    """Projections and convolutions, decay, step size, and the gated output; a subclass adds its operator."""

    def __init__(self, cfg: LinearMixer, decay: Decay, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.implementation, self.chunk_size = cfg.implementation, cfg.chunk_size
        self.state_shape = (cfg.value_heads, cfg.value_dim, cfg.key_dim)
        self.qkv = ConvolvedQkv(cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.decay = build_decay(decay, cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.beta = StepSize(cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.output = GatedOutput(cfg, model_dim=model_dim, std=std, rngs=rngs)

    def project_narrow(self, x_BTD: Float[Array, "B T D"]) -> Narrow:
        """Contracts the layer's input with the matrices of few columns, each by itself where heads are cut: of one
        matrix of parts that are cut and parts that are not, XLA sends all to all devices."""
        weights = Narrow(self.decay.narrow, self.beta.narrow, self.output.gate.narrow)
        if free_axes_of(HEAD_AXES, weights.beta.shape[1]):
            return jax.tree.map(lambda w: project("BTD,DR->BTR", x_BTD, w), weights)
        leaves, structure = jax.tree.flatten(weights)
        return jax.tree.unflatten(structure, project_narrow(x_BTD, leaves))

    def init_cache(self, batch: int, max_len: int, dtype: DTypeLike) -> RecurrentCache:
        """Makes the cache of an empty context; `max_len` does not matter to a recurrent state."""
        return RecurrentCache(jnp.zeros((batch, *self.state_shape), jnp.float32), self.qkv.init_cache(batch, dtype))
