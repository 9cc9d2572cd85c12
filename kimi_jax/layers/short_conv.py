"""What stands between a projection and a linear-attention operator: a short convolution with SiLU, or SiLU alone."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kimi_jax.config.mixer import Conv, NoConv, ShortConv
from kimi_jax.layers.param import param, uniform
from pallas_kernels.short_conv.api import short_conv


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
        weight = self.weight[...].astype(x_BTHK.dtype).reshape(self.channels, self.width)
        y, cache = short_conv(x_BTHK.reshape(B, T, self.channels), weight, cache=cache, segment_ids=segment_ids_BT)
        return y.reshape(B, T, H, K), cache


class PointwiseSilu(nnx.Module):
    """SiLU without a convolution; nothing is carried from token to token."""

    def __init__(self, cfg: NoConv, *, num_heads: int, head_dim: int, rngs: nnx.Rngs):
        del cfg, num_heads, head_dim, rngs

    def init_cache(self, batch: int, dtype: DTypeLike) -> None:
        return None

    def __call__(self, x_BTHK, cache: None, segment_ids_BT) -> tuple[Float[Array, "B T H K"], None]:
        return jax.nn.silu(x_BTHK), None


CONVS = {ShortConv: ShortConvolution, NoConv: PointwiseSilu}


def build_conv(cfg: Conv, *, num_heads: int, head_dim: int, rngs: nnx.Rngs) -> ShortConvolution | PointwiseSilu:
    """Builds the module of a `conv:` config."""
    return CONVS[type(cfg)](cfg, num_heads=num_heads, head_dim=head_dim, rngs=rngs)
