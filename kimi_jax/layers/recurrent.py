"""What the linear-attention mixers are made of, whatever operator stands in their middle, and the cache they carry."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from kimi_jax.config.mixer import Decay, LinearMixer
from kimi_jax.layers.cache import RecurrentCache
from kimi_jax.layers.decay import build_decay
from kimi_jax.layers.output_gate import GatedOutput
from kimi_jax.layers.qkv import ConvolvedQkv, StepSize


class RecurrentMixer(nnx.Module):
    """Projections and convolutions, decay, step size, and the gated output; a subclass adds its operator."""

    def __init__(self, cfg: LinearMixer, decay: Decay, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.implementation, self.chunk_size = cfg.implementation, cfg.chunk_size
        self.state_shape = (cfg.value_heads, cfg.value_dim, cfg.key_dim)
        self.qkv = ConvolvedQkv(cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.decay = build_decay(decay, cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.beta = StepSize(cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.output = GatedOutput(cfg, model_dim=model_dim, std=std, rngs=rngs)

    def init_cache(self, batch: int, max_len: int, dtype: DTypeLike) -> RecurrentCache:
        """Makes the cache of an empty context; `max_len` does not matter to a recurrent state."""
        return RecurrentCache(jnp.zeros((batch, *self.state_shape), jnp.float32), self.qkv.init_cache(batch, dtype))
