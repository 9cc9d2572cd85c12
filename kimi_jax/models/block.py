"""One pre-norm residual block: a token mixer, then a feed-forward block; which module serves which config type."""

import functools

from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kimi_jax.config.mixer import GdnMixer, KdaMixer, Mamba2Mixer, Mixer, MlaMixer
from kimi_jax.config.model import DenseFfn, Ffn, ModelConfig, MoeFfn
from kimi_jax.layers.cache import Cache
from kimi_jax.layers.gdn import gated_delta_net
from kimi_jax.layers.kda import Kda
from kimi_jax.layers.mamba2 import Mamba2
from kimi_jax.layers.mla import Mla
from kimi_jax.layers.mlp import Mlp
from kimi_jax.layers.moe import Moe
from kimi_jax.layers.norm import RMSNorm
from kimi_jax.layers.router import RouterStats
from kimi_jax.parallel.expert import run_on_mesh
from kimi_jax.parallel.rules import axes_of

MIXERS = {KdaMixer: Kda, GdnMixer: gated_delta_net, Mamba2Mixer: Mamba2, MlaMixer: Mla}
FFNS = {DenseFfn: Mlp, MoeFfn: functools.partial(Moe, dispatch=run_on_mesh)}


def add(x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x + y. As matrices, where tokens are not cut: so XLA has the product that makes y add to x, not to a copy."""
    if axes_of("tokens", x_BTD.shape[1]):
        return x_BTD + y_BTD
    x_MD, y_MD = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, y_BTD))
    return (x_MD + y_MD).reshape(x_BTD.shape)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); the residual stream keeps the compute dtype."""

    def __init__(self, cfg: ModelConfig, mixer: Mixer, ffn: Ffn, *, rngs: nnx.Rngs):
        sizes = {"model_dim": cfg.model_dim, "std": cfg.init_std, "rngs": rngs}
        self.mixer_norm = RMSNorm(cfg.model_dim, eps=cfg.norm_eps)
        self.mixer = MIXERS[type(mixer)](mixer, **sizes)
        self.ffn_norm = RMSNorm(cfg.model_dim, eps=cfg.norm_eps)
        self.ffn = FFNS[type(ffn)](ffn, **sizes)

    def init_cache(self, batch: int, max_len: int, dtype: DTypeLike) -> Cache:
        return self.mixer.init_cache(batch, max_len, dtype)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cache: Cache | None,
        segment_ids_BT: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterStats | None]:
        valid_BT: Bool[Array, "B T"] | None = None if segment_ids_BT is None else segment_ids_BT != 0
        x_BTD, normed_BTD = self.mixer_norm.beside(x_BTD)
        mixed_BTD, cache = self.mixer(normed_BTD, cache, segment_ids_BT)
        x_BTD, normed_BTD = self.ffn_norm.beside(add(x_BTD, mixed_BTD))
        addends, stats = self.ffn(normed_BTD, valid_BT)
        return functools.reduce(add, addends, x_BTD), cache, stats
