"""What stands between a projection and a linear-attention operator: a short convolution with SiLU, or SiLU alone."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kimi_jax.config.mixer import Conv, NoConv, ShortConv
from kimi_jax.layers.param import param, uniform
from pallas_kernels.short_conv.api import short_conv, short_conv_parts


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution over tokens, then SiLU; tap W-1 multiplies the current token.

    Taps start uniform in +-W^-0.5, the customary range for a fan-in of W.
    """

    def __init__(self, cfg: ShortConv, *, num_heads: int, head_dim: int, rngs: nnx.Rngs):
        self.width, self.channels = cfg.width, num_heads * head_dim
        taps = uniform(rngs, (num_heads, head_dim, cfg.width), -(cfg.width**-0.5), cfg.width**-0.5)
        self.weight = param(taps, axes=("heads", "head_dim", "conv"))

    def init_cache(self, batch: int, dtype: DTypeLike) -> Float[Array, "B W-1 D"]:
        return jnp.zeros((batch, self.width - 1, self.channels), dtype)

    def __call__(
        self,
        x_BTHK: Float[Array, "B T H K"],
        cache: Float[Array, "B W-1 D"] | None,
        segment_ids_BT: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B W-1 D"]]:
        B, T, H, K = x_BTHK.shape
        x = x_BTHK.reshape(B, T, self.channels)
        y, cache = short_conv(x, self._taps(x.dtype), cache=cache, segment_ids=segment_ids_BT)
        return y.reshape(B, T, H, K), cache

    def _taps(self, dtype: DTypeLike) -> Float[Array, "D W"]:
        return self.weight[...].astype(dtype).reshape(self.channels, self.width)

    @staticmethod
    def of_joined(
        convs: Sequence["ShortConvolution"],
        x_BTD: Float[Array, "B T D"],
        caches: Sequence[Float[Array, "B W-1 _"] | None],
        segment_ids_BT: Int[Array, "B T"] | None,
    ) -> tuple[Sequence[Float[Array, "B T _"]], Sequence[Float[Array, "B W-1 _"]]]:
        """Runs several at once; x has their inputs beside each other. Returns the results and the caches of each."""
        weight = jnp.concatenate([conv._taps(x_BTD.dtype) for conv in convs])
        widths = tuple(conv.channels for conv in convs)
        cache = None if caches[0] is None else jnp.concatenate(caches, axis=-1)
        ys, cache = short_conv_parts(x_BTD, weight, widths, cache=cache, segment_ids=segment_ids_BT)
        return ys, jnp.split(cache, _cuts(convs), axis=-1)


class PointwiseSilu(nnx.Module):
    """SiLU without a convolution; nothing is carried from token to token."""

    def __init__(self, cfg: NoConv, *, num_heads: int, head_dim: int, rngs: nnx.Rngs):
        del cfg, rngs
        self.channels = num_heads * head_dim

    def init_cache(self, batch: int, dtype: DTypeLike) -> None:
        return None

    def __call__(self, x_BTHK, cache: None, segment_ids_BT) -> tuple[Float[Array, "B T H K"], None]:
        return jax.nn.silu(x_BTHK), None

    @staticmethod
    def of_joined(convs: Sequence["PointwiseSilu"], x_BTD, caches: Sequence[None], segment_ids_BT):
        return jnp.split(jax.nn.silu(x_BTD), _cuts(convs), axis=-1), caches


def _cuts(convs: Sequence[ShortConvolution] | Sequence[PointwiseSilu]) -> list[int]:
    """Where the channels of the second and of those after it begin, beside each other."""
    return list(itertools.accumulate(conv.channels for conv in convs))[:-1]


CONVS = {ShortConv: ShortConvolution, NoConv: PointwiseSilu}


def build_conv(cfg: Conv, *, num_heads: int, head_dim: int, rngs: nnx.Rngs) -> ShortConvolution | PointwiseSilu:
    """Builds the module of a `conv:` config."""
    return CONVS[type(cfg)](cfg, num_heads=num_heads, head_dim=head_dim, rngs=rngs)
