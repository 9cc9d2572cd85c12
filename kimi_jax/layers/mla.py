"""The multi-head latent attention mixer: what is cached, what is rotated, and which of two equal forms runs."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kimi_jax.config.mixer import MlaMixer, NoPosition, Position, Rope
from kimi_jax.layers.cache import MlaCache, Placement, place_tokens
from kimi_jax.layers.linear import apart, project
from kimi_jax.layers.norm import RMSNorm
from kimi_jax.layers.param import normal, param
from kimi_jax.layers.rope import rotate
from pallas_kernels.mla.api import mla_absorbed_attention, mla_attention, mla_latent_attention

expand_latents = functools.partial(project, "BSR,RHK->BSHK")


class Rotation(nnx.Module):
    """Rotates the shared key and the query dimensions that meet it by position within the document."""

    def __init__(self, cfg: Rope):
        self.theta = cfg.theta

    def __call__(self, x: Float[Array, "B T *H P"], position_BT: Int[Array, "B T"]) -> Float[Array, "B T *H P"]:
        return rotate(x, position_BT, self.theta)


class NoRotation(nnx.Module):
    """NoPE: leaves them as they are."""

    def __init__(self, cfg: NoPosition):
        del cfg

    def __call__(self, x: Float[Array, "B T *H P"], position_BT: Int[Array, "B T"]) -> Float[Array, "B T *H P"]:
        return x


ROTATIONS = {Rope: Rotation, NoPosition: NoRotation}


def build_rotation(cfg: Position) -> Rotation | NoRotation:
    """Builds the module of a `position:` config."""
    return ROTATIONS[type(cfg)](cfg)


class Mla(nnx.Module):
    """Multi-head latent attention.

    `query` holds nope|rope per head, `latent_down` holds latent|shared key, `latent_up` holds key|value per head.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; without position encoding: Kimi Linear, arXiv:2510.26692.
    """

    def __init__(self, cfg: MlaMixer, *, model_dim: int, std: float, rngs: nnx.Rngs):
        D, H, R, P, N, V = model_dim, cfg.num_heads, cfg.latent_dim, cfg.rope_dim, cfg.nope_dim, cfg.value_dim
        self.latent_dim, self.rope_dim, self.nope_dim, self.implementation = R, P, N, cfg.implementation
        self.query = param(normal(rngs, (D, H, N + P), std), axes=("embed", "heads", "head_dim"))
        self.latent_down = param(normal(rngs, (D, R + P), std), axes=("embed", "latent"))
        self.latent_norm = RMSNorm(R, eps=cfg.latent_norm_eps, axis="latent")
        self.latent_up = param(normal(rngs, (R, H, N + V), std), axes=("latent", "heads", "head_dim"))
        self.output = param(normal(rngs, (H, V, D), std), axes=("heads", "head_dim", "embed"))
        self.rotation = build_rotation(cfg.position)
        # Below so many queries, reading each cached latent H times costs less than expanding it into keys and values.
        self.max_absorbed_queries = R * (N + V) // max(2 * R - N - V, 1)

    def init_cache(self, batch: int, max_len: int, dtype: DTypeLike) -> MlaCache:
        """Makes the cache of an empty context with room for `max_len` tokens per row, padding included."""
        return MlaCache(
            latent=jnp.zeros((batch, max_len, self.latent_dim), dtype),
            shared_key=jnp.zeros((batch, max_len, self.rope_dim), dtype),
            document=jnp.zeros((batch, max_len), jnp.int32),
            length=jnp.zeros((), jnp.int32),
            open_document=jnp.ones(batch, jnp.int32),
            position=jnp.zeros(batch, jnp.int32),
        )

    @jax.named_scope("mla")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cache: MlaCache | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MlaCache | None]:
        B, T, _ = x_BTD.shape
        ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
        opened = (jnp.ones(B, jnp.int32), jnp.zeros(B, jnp.int32))
        placement = place_tokens(ids_BT, *((cache.open_document, cache.position) if cache else opened))
        query, latent, shared_key = self._project(x_BTD, placement)
        if cache is None:
            documents = None if segment_ids_BT is None else placement.document
            settings = dict(expand=expand_latents, segment_ids=documents, implementation=self.implementation)
            o, _ = mla_latent_attention(*query, latent, shared_key, self.latent_up[...], **settings)
        else:
            masks = dict(segment_ids=placement.document, query_offset=cache.length)
            cache = append(cache, latent, shared_key, placement)
            attend = self._attend_absorbed if self.max_absorbed_queries > T else self._attend_expanded
            o, _ = attend(query, cache.latent, cache.shared_key, key_segment_ids=cache.document, **masks)
        return project("BTHV,HVD->BTD", o, self.output[...]), cache

    def _project(self, x_BTD, placement: Placement):
        query = project("BTD,DHK->BTHK", x_BTD, self.query[...])
        down = project("BTD,DR->BTR", apart(x_BTD), self.latent_down[...])
        query_nope, query_shared = jnp.split(query, [self.nope_dim], axis=-1)
        latent, shared_key = jnp.split(down, [self.latent_dim], axis=-1)
        query_shared = self.rotation(query_shared, placement.position)
        return (
            (query_nope, query_shared),
            self.latent_norm(latent),
            self.rotation(shared_key, placement.position),
        )

    def _attend_expanded(self, query, latent_BSR, shared_key, **masks):
        key, value = jnp.split(expand_latents(latent_BSR, self.latent_up[...]), [self.nope_dim], axis=-1)
        return mla_attention(*query, key, shared_key, value, **masks)

    def _attend_absorbed(self, query, latent_BSR, shared_key, **masks):
        query_nope, query_shared = query
        up_key, up_value = jnp.split(self.latent_up[...].astype(latent_BSR.dtype), [self.nope_dim], axis=-1)
        q_latent = jnp.einsum("BTHN,RHN->BTHR", query_nope, up_key)
        scale = (query_nope.shape[-1] + query_shared.shape[-1]) ** -0.5
        context_BTHR, max_logit = mla_absorbed_attention(
            *(q_latent, query_shared, latent_BSR, shared_key), scale=scale, **masks
        )
        return jnp.einsum("BTHR,RHV->BTHV", context_BTHR, up_value), max_logit


def append(cache: MlaCache, latent: Float[Array, "B T R"], shared_key: Float[Array, "B T P"], placement: Placement):
    """Writes the next T tokens, padding among them, into the next T slots."""

    def write(slots, new):
        start = (0, cache.length, *(0,) * (slots.ndim - 2))
        return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), start)

    return MlaCache(
        latent=write(cache.latent, latent),
        shared_key=write(cache.shared_key, shared_key),
        document=write(cache.document, placement.document),
        length=cache.length + latent.shape[1],
        open_document=placement.open_document,
        position=placement.next_position,
    )
