"""The Gated DeltaNet mixer: KDA whose forget gate is one number per head."""

from flax import nnx

from kimi_jax.config.mixer import GdnMixer, KdaMixer, LinearMixer
from kimi_jax.layers.kda import Kda


def gated_delta_net(cfg: GdnMixer, *, model_dim: int, std: float, rngs: nnx.Rngs) -> Kda:
    """Builds a `Kda` with a decay per head.

    Source: Gated Delta Networks, arXiv:2412.06464; as the baseline of Kimi Linear, arXiv:2510.26692, section 5.
    """
    shared = {name: getattr(cfg, name) for name in LinearMixer.model_fields}
    kda = KdaMixer(**shared, decay=cfg.decay, implementation=cfg.implementation)
    return Kda(kda, model_dim=model_dim, std=std, rngs=rngs)
