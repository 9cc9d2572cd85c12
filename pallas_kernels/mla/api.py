"""Public entry of multi-head latent attention: signatures, argument checks and the tables of implementations."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import Arrays, check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.mla import cudnn, mosaic_gpu, xla
from pallas_kernels.partition import Axes, partition

__all__ = [
    "ABSORBED_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "mla_absorbed_attention",
    "mla_attention",
    "mla_latent_attention",
]

# Fastest first.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.mla_attention, mosaic_gpu.refuse),
    "cudnn": Implementation(cudnn.mla_attention, cudnn.refuse),
    "xla": Implementation(xla.mla_attention),
}
ABSORBED_IMPLEMENTATIONS = {"xla": Implementation(xla.mla_absorbed_attention)}
MASKS = {"segment_ids": "B", "key_segment_ids": "B"}
AXES = Axes(("B-H", "B-H", "B-H", "B", "B-H"), ("B-H", "H^B"), MASKS)
LATENT_AXES = Axes(("BTH", "BTH", "BT", "BT", "-E"), ("BTH", "E^B"), {"segment_ids": "BT"}, exchanges=True)
ABSORBED_AXES = Axes(("B-H", "B-H", "B", "B"), ("B-H", "H^B"), MASKS)


def mla_attention(
    q_nope: Float[Array, "B T H N"],
    q_shared: Float[Array, "B T H P"],
    k_nope: Float[Array, "B S H N"],
    k_shared: Float[Array, "B S P"],
    v: Float[Array, "B S H V"],
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "H"]]:
    """Runs causal softmax attention in the expanded form: training and long prefills.

    Logits are scale (q_nope . k_nope + q_shared . k_shared); query t sees keys s <= t + query_offset of its segment.

    Args:
      q_nope, q_shared, k_nope, k_shared, v: bfloat16, float16 or float32, one dtype.
      scale: factor on the logits; None: (N + P)**-0.5.
      segment_ids: int32; 0 is padding, which may hold anything finite and gives zero output. An id stands for one
        document only, unlike in `chunk_kda`.
      key_segment_ids: int32; 0 is padding or an unwritten slot, which nothing sees. None: `segment_ids`.
      query_offset: int32, key index of the first query.
      implementation: "auto" or a key of `IMPLEMENTATIONS`.

    Returns:
      (o in the dtype of v, largest logit per head that the mask let through, float32, without gradient; -1e30 if there
      was none). Softmax and sums are float32; the probabilities are cast to the dtype of v before they meet it.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    arrays = {"q_nope": (q_nope, "B T H N"), "q_shared": (q_shared, "B T H P"), "k_nope": (k_nope, "B S H N")}
    arrays |= {"k_shared": (k_shared, "B S P"), "v": (v, "B S H V")}
    key_segment_ids = _check("mla_attention", arrays, segment_ids, key_segment_ids)
    scale = (q_nope.shape[-1] + q_shared.shape[-1]) ** -0.5 if scale is None else scale
    masks = {"segment_ids": segment_ids, "key_segment_ids": key_segment_ids, "query_offset": query_offset}
    settings = {"scale": scale, "axes": AXES, **masks}
    return call("mla_attention", IMPLEMENTATIONS, implementation, q_nope, q_shared, k_nope, k_shared, v, **settings)


def mla_latent_attention(
    q_nope: Float[Array, "B T H N"],
    q_shared: Float[Array, "B T H P"],
    latent: Float[Array, "B T R"],
    k_shared: Float[Array, "B T P"],
    up: Float[Array, "R H N+V"],
    *,
    expand: Callable,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "H"]]:
    """Runs `mla_attention` of the tokens on themselves, with the keys and values that their latents expand to.

    Where devices have a part of the tokens each, latents go to all of them and queries to the one that has their head;
    it expands the latents for its heads alone, and the results go back. So all devices have the same work, wherever
    documents begin, and no keys or values travel.

    Args:
      up: makes keys and values of the latents; the number of its heads on a device must divide over those that share
        the tokens.
      expand: (latent, up) -> keys beside values, [B, T, H, N + V].
      The others: as in `mla_attention`.
    """
    settings = {"expand": expand, "scale": scale, "segment_ids": segment_ids}
    attend = functools.partial(_attend_latents, implementation)
    return partition(attend, LATENT_AXES, (q_nope, q_shared, latent, k_shared, up), settings)


def _attend_latents(
    implementation: str, q_nope, q_shared, latent, k_shared, up, *, expand, scale, segment_ids, axis: str | None = None
):
    N = q_nope.shape[-1]
    if axis is not None:
        q = jnp.concatenate([q_nope, q_shared], -1)
        q_nope, q_shared = jnp.split(lax.all_to_all(q, axis, split_axis=2, concat_axis=1, tiled=True), [N], -1)
        latent, k_shared, segment_ids = lax.all_gather((latent, k_shared, segment_ids), axis, axis=1, tiled=True)
    k_nope, v = jnp.split(expand(latent, up), [N], -1)
    settings = {"scale": scale, "segment_ids": segment_ids, "implementation": implementation}
    o, max_logit = mla_attention(q_nope, q_shared, k_nope, k_shared, v, **settings)
    return o if axis is None else lax.all_to_all(o, axis, split_axis=1, concat_axis=2, tiled=True), max_logit


def mla_absorbed_attention(
    q_latent: Float[Array, "B T H R"],
    q_shared: Float[Array, "B T H P"],
    latent: Float[Array, "B S R"],
    k_shared: Float[Array, "B S P"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H R"], Float[Array, "H"]]:
    """Runs the same attention on the latents themselves: one key and one value for all heads, for few queries.

    The key up-projection is folded into `q_latent`; the caller applies the value up-projection to the result.
    Arguments and results are those of `mla_attention`, with `latent` as key and as value.
    """
    arrays = {"q_latent": (q_latent, "B T H R"), "q_shared": (q_shared, "B T H P"), "latent": (latent, "B S R")}
    key_segment_ids = _check(
        "mla_absorbed_attention", arrays | {"k_shared": (k_shared, "B S P")}, segment_ids, key_segment_ids
    )
    masks = {"segment_ids": segment_ids, "key_segment_ids": key_segment_ids, "query_offset": query_offset}
    settings = {"scale": scale, "axes": ABSORBED_AXES, **masks}
    return call(
        "mla_absorbed_attention",
        ABSORBED_IMPLEMENTATIONS,
        implementation,
        *(q_latent, q_shared, latent, k_shared),
        **settings,
    )


def _check(op: str, arrays: Arrays, segment_ids, key_segment_ids) -> Int[Array, "B S"] | None:
    """Returns the segment ids of the keys."""
    sizes = check_arrays(op, arrays, may_be_0="NP")
    check_one_dtype(op, **{name: x for name, (x, _) in arrays.items()})
    T, S = sizes["T"], sizes["S"]
    if key_segment_ids is None and S == T:
        key_segment_ids = segment_ids
    if (segment_ids is None) != (key_segment_ids is None):
        raise ValueError(f"{op}: with {T=} queries and {S=} keys give both segment_ids and key_segment_ids, or neither")
    ids = {"segment_ids": (segment_ids, "B T"), "key_segment_ids": (key_segment_ids, "B S")}
    check_arrays(op, {}, ids, may_be_0="NP", **sizes)
    return key_segment_ids
