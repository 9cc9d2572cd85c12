"""The Mamba2 mixer: one decay per head and no delta correction, inside the same projections as KDA."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from kimi_jax.config.mixer import Mamba2Mixer
from kimi_jax.layers.cache import RecurrentCache
from kimi_jax.layers.norm import l2_normalize
from kimi_jax.layers.recurrent import RecurrentMixer
from pallas_kernels.ssd.api import chunk_ssd


class Mamba2(RecurrentMixer):
    """The paper's baseline: S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T with KDA's convolution, norms and output gate.

    Source: arXiv:2405.21060; as the baseline of Kimi Linear, arXiv:2510.26692, section 5.
    """

    def __init__(self, cfg: Mamba2Mixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        super().__init__(cfg, cfg.decay, model_dim=model_dim, std=std, rngs=rngs)

    @jax.named_scope("mamba2")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cache: RecurrentCache | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RecurrentCache | None]:
        low = self.project_narrow(x_BTD)
        q, k, v, conv = self.qkv(x_BTD, cache and cache.conv, segment_ids_BT)
        o, state = chunk_ssd(
            *(l2_normalize(q), l2_normalize(k), v, self.decay.log_decay(x_BTD), self.beta(low.beta)),
            initial_state=cache and cache.state,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
            tile=self.chunk_size,
        )
        return self.output(o, low.output), None if cache is None else RecurrentCache(state, conv)
