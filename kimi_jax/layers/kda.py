"""The Kimi Delta Attention mixer: a gated delta rule with one forget gate per key channel."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from kimi_jax.config.mixer import KdaMixer
from kimi_jax.layers.cache import RecurrentCache
from kimi_jax.layers.linear import fan_out
from kimi_jax.layers.recurrent import RecurrentMixer
from pallas_kernels.kda.api import chunk_kda, step_kda


class Kda(RecurrentMixer):
    """Projections and convolutions, the delta rule, then norm, gate and output projection.

    Source: Kimi Linear, arXiv:2510.26692, section 4.
    """

    def __init__(self, cfg: KdaMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        super().__init__(cfg, cfg.decay, model_dim=model_dim, std=std, rngs=rngs)

    @jax.named_scope("kda")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cache: RecurrentCache | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RecurrentCache | None]:
        x_BTD, for_rest = fan_out(x_BTD, 2)
        low = self.project_narrow(for_rest)
        q, k, v, conv = self.qkv(x_BTD, cache and cache.conv, segment_ids_BT)
        g, gate = self.decay(for_rest, low.decay)
        o, state = self._delta_rule(q, k, v, g, self.beta(low.beta), gate, cache and cache.state, segment_ids_BT)
        return self.output(o, low.output), None if cache is None else RecurrentCache(state, conv)

    def _delta_rule(self, q, k, v, g, beta, gate, state, segment_ids):
        settings = {"gate": gate, "normalize_qk": True}
        if q.shape[1] == 1 and state is not None and segment_ids is None:
            o, state = step_kda(*(x[:, 0] for x in (q, k, v, g, beta)), state, **settings)
            return o[:, None], state
        settings |= {"implementation": self.implementation, "tile": self.chunk_size}
        return chunk_kda(q, k, v, g, beta, initial_state=state, segment_ids=segment_ids, **settings)
