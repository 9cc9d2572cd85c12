"""Queries, keys, values and step sizes of the linear-attention mixers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kimi_jax.config.mixer import LinearMixer
from kimi_jax.layers.cache import ConvCache
from kimi_jax.layers.linear import each_apart, fan_out, is_longer, project
from kimi_jax.layers.param import normal, param
from kimi_jax.layers.short_conv import build_conv
from pallas_kernels.partition import HEAD_AXES, free_axes_of


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
        weights = [weight[...] for weight in (self.query, self.key, self.value)]
        convs, caches = (self.query_conv, self.key_conv, self.value_conv), cache or (None,) * 3
        if self._joins(x_BTD, weights):
            weight = jnp.concatenate([w.reshape(w.shape[0], -1) for w in each_apart(*weights)], axis=1)
            joined = project("BTD,DR->BTR", x_BTD, weight)
            results, caches = convs[0].of_joined(convs, joined, caches, segment_ids_BT)
            results = [y.reshape(*y.shape[:2], *w.shape[1:]) for y, w in zip(results, weights, strict=True)]
        else:
            projected = [project("BTD,DHK->BTHK", x, w) for x, w in zip(fan_out(x_BTD, 3), weights, strict=True)]
            pairs = [conv(x, c, segment_ids_BT) for conv, x, c in zip(convs, projected, caches, strict=True)]
            results, caches = zip(*pairs, strict=True)
        return *results, ConvCache(*caches)

    def _joins(self, x_BTD, weights) -> bool:
        """Whether to read x once: of many tokens, and of whole heads, as each device keeps its part of each matrix."""
        cut = any(free_axes_of(HEAD_AXES, w.shape[1]) for w in weights)
        return not cut and is_longer(x_BTD, [w.reshape(w.shape[0], -1) for w in weights])


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
