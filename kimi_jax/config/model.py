"""The model as data: a pattern of named mixers, the feed-forward blocks, and the widths around them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kimi_jax.config.base import Config, nearest
from kimi_jax.config.mixer import Epsilon, Mixer, PositiveInt


class DenseFfn(Config):
    """SwiGLU: down(silu(gate x) * up x)."""

    kind: Literal["dense"] = "dense"
    hidden_dim: PositiveInt


class MoeFfn(Config):
    """Dropless mixture of SwiGLU experts with a sigmoid router (DeepSeek-V3 form, as in Moonlight and Kimi Linear)."""

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt
    top_k: PositiveInt
    hidden_dim: PositiveInt
    """Hidden width F of one expert."""
    num_shared_experts: Annotated[int, Field(ge=0)] = 1
    """Shared experts, fused into one SwiGLU of width num_shared_experts * hidden_dim; 0: none."""
    routed_scaling: Annotated[float, Field(gt=0)] = 2.446
    """Factor on the renormalised routing weights."""
    renormalize: bool = True
    """Divide the chosen scores by their sum before scaling."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3
    """Step of the auxiliary-loss-free balancing bias, once per optimizer step; 0 freezes it."""
    balance_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the sequence-wise balance loss; 0: none."""
    capacity: Annotated[float, Field(ge=1)] = 1.5
    """Over several devices (mesh.expert): choices that one device can send to another, in even shares of all its
    choices; more are dropped and counted. mesh.expert or more: none ever is."""
    implementation: Literal["auto", "mosaic_gpu", "xla", "reference"] = "auto"
    """Which grouped products the experts run on."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.top_k > self.num_experts:
            yield "top_k", f"{self.top_k} is larger than num_experts={self.num_experts}"


Ffn = Annotated[DenseFfn | MoeFfn, Field(discriminator="kind")]


class ModelConfig(Config):
    """A decoder: `pattern` repeats over the layers; the first `first_k_dense` have the dense feed-forward block."""

    vocab_size: PositiveInt
    model_dim: PositiveInt
    """Width D of the residual stream."""
    num_layers: PositiveInt
    pattern: Annotated[tuple[str, ...], Field(min_length=1)]
    """Mixer names, repeated; [kda, kda, kda, mla] is the paper's 3:1."""
    tail: tuple[str, ...] = ()
    """Mixers of the last layers, behind whole patterns: a short group of 3:1, or the one MLA layer of 15:1."""
    mixers: dict[str, Mixer]
    """The mixers that `pattern` and `tail` name."""
    ffn: Ffn
    first_k_dense: Annotated[int, Field(ge=0)] = 0
    """Leading layers with `dense_hidden_dim` instead of `ffn`."""
    dense_hidden_dim: PositiveInt | None = None
    norm_eps: Epsilon = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of every projection and embedding at initialisation."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype of activations and matrix products; parameters are float32."""
    scan_layers: bool = True
    """Whether layers that repeat are stacked and share one compiled body. Otherwise each has arrays of its own: longer
    to compile, and nothing is copied into stacks and out of them."""

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """The mixer name of each layer, 0-indexed."""
        return self.pattern * ((self.num_layers - len(self.tail)) // len(self.pattern)) + self.tail

    def ffn_of_layer(self, layer: int) -> DenseFfn | MoeFfn:
        return DenseFfn(hidden_dim=self.dense_hidden_dim) if layer < self.first_k_dense else self.ffn

    def problems(self) -> Iterator[tuple[str, str]]:
        for field in ("pattern", "tail"):
            for name in getattr(self, field):
                if name not in self.mixers:
                    yield field, f"{name!r} names no mixer; {nearest(name, self.mixers)}"
        before = self.num_layers - len(self.tail)
        if before < 0 or before % len(self.pattern):
            what = f"names {len(self.tail)} mixers: num_layers={self.num_layers} leaves {before} layers before them"
            yield "tail", f"{what}, must be whole patterns of {len(self.pattern)}"
        if self.first_k_dense > self.num_layers:
            yield "first_k_dense", f"{self.first_k_dense} is larger than num_layers={self.num_layers}"
        if self.first_k_dense and not self.dense_hidden_dim:
            yield "dense_hidden_dim", f"is not set, but first_k_dense={self.first_k_dense} needs it"
