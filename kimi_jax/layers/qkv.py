"""Queries, keys, values and step sizes of the linear-attention mixers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kimi_jax.config.mixer import LinearMixer
from kimi_jax.layers.cache import ConvCache
from kimi_jax.layers.linear import fan_out, project
from kimi_jax.layers.param import normal, param
from kimi_jax.layers.short_conv import build_conv


class ConvolvedQkv(nnx.Module):
    """Projects to q, k and v per head and runs each through its own short convolution (or SiLU alone)."""

    def __init__(self, cfg: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        D, H, HV, K, V = model_dim, cfg.num_heads, cfg.value_heads, cfg.key_dim, cfg.value_dim
        axes = ("embed", "heads", "head_dim")
        self.query = param(normal(rngs, (D, H, K), std), axes=axes)
        self.key = param(normal(rngs, (D, H, K), std), axes=axes)
        self.value = param(normal(rngs, (D, HV, V), std), axes=axes)
        self.query_conv = build_conv(cfg.conv, num_heads=H, head_dim=K, rngs=rngs)
        self.key_conv = build_conv(cfg.conv, num_heads=H, head_dim=K, rngs=rngs)
        self.value_conv = build_conv(cfg.conv, num_heads=HV, head_dim=V, rngs=rngs)

    def init_cache(self, batch: int, dtype: DTypeLike) -> ConvCache:
        return ConvCache(*(c.init_cache(batch, dtype) for c in (self.query_conv, self.key_conv, self.value_conv)))

    @jax.named_scope("qkv")
    def __call__(
        self, x_BTD: Float[Array, "B T D"], cache: ConvCache | None, segment_ids_BT: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T HV V"], ConvCache]:
        streams = (
            (self.query, self.query_conv, cache and cache.query),
            (self.key, self.key_conv, cache and cache.key),
            (self.value, self.value_conv, cache and cache.value),
        )
        projected = [
            conv(project("BTD,DHK->BTHK", x, weight[...]), conv_cache, segment_ids_BT)
            for x, (weight, conv, conv_cache) in zip(fan_out(x_BTD, 3), streams, strict=True)
        ]
        (q, query_cache), (k, key_cache), (v, value_cache) = projected
        return q, k, v, ConvCache(query_cache, key_cache, value_cache)


class StepSize(nnx.Module):
    """beta = sigmoid(x w), one per value head, in (0, 1), float32."""

    def __init__(self, cfg: LinearMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.weight = param(normal(rngs, (model_dim, cfg.value_heads), std), axes=("embed", "heads"))

    @property
    def narrow(self) -> Float[Array, "D HV"]:
        return self.weight[...]

    def __call__(self, raw_BTH: Float[Array, "B T HV"]) -> Float[Array, "B T HV"]:
        """`raw_BTH`: the layer's input times `narrow`."""
        return jax.nn.sigmoid(raw_BTH.astype(jnp.float32))
